"""One stage from start to finish: what trains, which trainer, where it goes on, what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from linearize import launched, objectives, storing
from linearize.config.schema import RunConfig, StageConfig
from linearize.distill import answers, memory, pieces, processes, shards
from linearize.distill.callbacks import RunStopped, StageCallback, forget_lines
from linearize.distill.finetune import FinetuneTrainer, needs_teacher, predict_teacher
from linearize.distill.pieces import Pieces
from linearize.distill.positions import counted_from_zero
from linearize.distill.preference import PreferenceTrainer
from linearize.distill.profiling import Traced
from linearize.distill.stage import StageTrainer
from linearize.distill.trainable import prepare, trained
from linearize.distill.transfer import TransferTrainer
from linearize.distill.tying import untied
from linearize.errors import CheckpointError
from linearize.models.cache import sha256
from linearize.models.unwrapped import unwrapped
from linearize.objectives import TopK
from linearize.progress import Meter

FINAL = "final.safetensors"
DONE = "done.json"
LOGITS = 2**27
"""Of a teacher whose likeliest are looked for, at once."""


@dataclass(frozen=True)
class StagePlace:
    """Where a stage stands in its run."""

    index: int
    """From 1."""
    count: int
    name: str
    folder: Path
    metrics: Path
    resume_command: str

    less_memory: Callable[[], str]
    """What to do where memory runs out, in sentences."""

    track: Callable[[dict[str, Any]], None] = lambda line: None
    """Takes each line of metrics, in the first process."""

    part: str = ""
    """Which part of the stage it is, behind its name in messages."""

    @property
    def done(self) -> bool:
        """Whether an earlier run has finished this stage."""
        return (self.folder / DONE).is_file()


def restore(model: nn.Module, stage: StageConfig, place: StagePlace) -> nn.Module:
    """Put a finished stage's result into the model, as if it had just been trained.

    Raises:
        CheckpointError: the stage's file is damaged or of another recipe.
    """
    shards.settle(model)
    model = prepare(model, stage)
    remedy = f"Delete {place.folder}, then {storing.AGAIN}: the stage is then trained again"
    written = storing.read_json(place.folder / DONE, remedy).get("sha256")
    found = Pieces(place.folder / FINAL)
    processes.alone(lambda: _check(place.folder, written, remedy))
    pieces.load(model, found)
    if launched.first():
        storing.prune(place.folder, keep=0)  # an earlier process may have been cut off in doing so
    return model


def train(
    model: nn.Module,
    stage: StageConfig,
    place: StagePlace,
    *,
    run: RunConfig,
    dataset: Any,
    length: int,
    autocast: torch.dtype | None,
    teacher: Callable[[], nn.Module] | None,
    transfer: type[TransferTrainer] = TransferTrainer,
) -> nn.Module:
    """Train a stage, from its newest intact checkpoint when there is one, and write its result.

    Args:
        model: as the stage before left it; changed in place.
        stage: its settings.
        place: its number, name and folder.
        run: seed and workers.
        dataset: packed sequences, or pairs.
        length: tokens in a sequence.
        autocast: compute dtype, or None.
        teacher: gives the original model, for a stage that needs it after the base weights have changed.
        transfer: trainer of a stage whose objectives are per layer.

    Returns:
        The model to go on with, in evaluation mode and with nothing marked as trainable.

    Raises:
        RunStopped: Ctrl-C; a resumable checkpoint has been written.
        NonFiniteLossError: the loss or its gradient became NaN or infinite.
        CheckpointError: a checkpoint could not be written or read.
        OutOfMemoryError: with the step.
    """
    start = processes.alone(lambda: storing.newest_intact(place.folder))
    opened = training(
        model,
        stage,
        name=place.name,
        folder=place.folder,
        run=run,
        seed=run.seed + place.index,
        dataset=dataset,
        length=length,
        autocast=autocast,
        teacher=teacher,
        transfer=transfer,
    )
    with opened as trainer:
        model = trainer.trained_model
        _fit(trainer, place, start)
    result = place.folder / FINAL
    processes.alone(lambda: pieces.remove(result))
    processes.each(lambda: pieces.write(result, trained(model)))
    processes.alone(lambda: _finish(trainer, place))
    [wish] = processes.most([trainer.interrupt.wish])
    if wish:
        raise RunStopped(
            f"stopped after stage '{place.name}'{place.part}. Go on with:\n  {place.resume_command}", wish
        )
    model.requires_grad_(False)
    return model.eval()


def _finish(trainer: StageTrainer, place: StagePlace) -> None:
    """Say that the stage's result is there, and remove its checkpoints."""
    sums = {path.name: sha256(path) for path in pieces.files(place.folder / FINAL)}
    storing.write_json(
        place.folder / DONE,
        {
            "steps": trainer.course.steps,
            "tokens": trainer.course.tokens,
            "stage": place.name,
            "micro_batch": trainer.micro.size,
            "sha256": sums.get(FINAL, sums),
        },
    )
    storing.prune(place.folder, keep=0)
    storing.remove(place.folder / answers.FOLDER)


def _check(folder: Path, written: Any, remedy: str) -> None:
    """Hold a stage's result against its checksum, or its pieces against theirs."""
    for path in pieces.files(folder / FINAL):
        said = written.get(path.name) if isinstance(written, dict) else written
        if said is not None and said != sha256(path):
            raise CheckpointError(f"{path}: is not what was written (another checksum). {remedy}")


@contextmanager
def training(
    model: nn.Module,
    stage: StageConfig,
    *,
    name: str,
    folder: Path,
    run: RunConfig,
    seed: int,
    dataset: Any,
    length: int,
    autocast: torch.dtype | None,
    teacher: Callable[[], nn.Module] | None,
    transfer: type[TransferTrainer] = TransferTrainer,
) -> Iterator[StageTrainer]:
    """Inside, a stage's trainer, with the model as the stage wants it; afterwards no gradients are left.

    Args:
        name: of the stage.
        folder: of its checkpoints.
        seed: of this stage.
        model, stage, run, dataset, length, autocast, teacher, transfer: see `train`.
    """
    set_seed(seed)
    shards.settle(model)
    model = prepare(model, stage)
    settings: dict[str, Any] = {
        "name": name,
        "stage": stage,
        "run": run,
        "folder": folder,
        "dataset": dataset,
        "length": length,
        "seed": seed,
        "device": next(model.parameters()).device,
        "autocast": autocast,
    }
    base = unwrapped(model)
    checkpointing = _checkpointing(base, stage.gradient_checkpointing)
    with untied(model, stage.untie), _cache_kept(base.config), checkpointing:
        level = objectives.level_of(stage.objective)
        try:
            if level == "layer":
                trainer: StageTrainer = transfer(model, **settings)
            else:
                if stage.top_k:
                    settings["dataset"], teacher = _answered(model, stage, settings, teacher), None
                original = teacher() if teacher is not None and needs_teacher(stage.objective) else None
                kind = PreferenceTrainer if level == "pair" else FinetuneTrainer
                trainer = kind(model, teacher=original, **settings)
            with _let_go_at_once(model, trainer.parameters.values()):
                yield trainer
        finally:
            shards.settle(model)
            model.zero_grad(set_to_none=True)


@contextmanager
def _cache_kept(config: Any) -> Iterator[None]:
    """Afterwards a config says of caches what it said, or nothing: Trainer switches them off for good."""
    before = vars(config).get(
        "use_cache"
    )  # configs of several models (Fuyu's, Gemma 4's) have none of their own
    try:
        yield
    finally:
        vars(config).pop("use_cache", None)
        if before is not None:
            config.use_cache = before


@contextmanager
def _let_go_at_once(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, the model lets go of gradients without a look at all that is frozen, for which the device would wait.

    Args:
        model: that `Trainer` tells to after every step.
        parameters: that have gradients.
    """
    parameters = list(parameters)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in parameters:
            parameter.grad = None

    model.zero_grad = zero_grad  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.zero_grad


def _answered(
    model: nn.Module, stage: StageConfig, settings: dict[str, Any], teacher: Callable[[], nn.Module] | None
) -> answers.Answered:
    """The stage's text with the teacher's answers, after which the teacher is gone."""
    device, autocast, length = settings["device"], settings["autocast"], settings["length"]

    def answer() -> Callable[[dict[str, Tensor]], TopK]:
        original = None if teacher is None else teacher()

        def of(batch: dict[str, Tensor]) -> TopK:
            given = {key: batch[key].to(device) for key in ("input_ids", "position_ids")}
            passes = (
                nullcontext()
                if autocast is None
                else torch.autocast(device.type, autocast, cache_enabled=False)
            )
            with counted_from_zero(model if original is None else original), passes:
                return TopK.of(predict_teacher(model, given, original), stage.top_k)

        return of

    at_once = max(1, LOGITS // (length * unwrapped(model).config.get_text_config().vocab_size))
    return answers.remembered(settings["dataset"], settings["folder"], stage.top_k, answer, at_once)


def _fit(trainer: StageTrainer, place: StagePlace, start: Path | None) -> None:
    """Run the trainer under the progress bar."""
    steps_before = int(start.name.rpartition("-")[2]) if start else 0
    processes.alone(lambda: forget_lines(place.metrics, place.name, after=steps_before))
    interrupt = trainer.interrupt
    meter = Meter(
        f"stage {place.index}/{place.count} {place.name}{place.part}",
        trainer.course.tokens,
        done=trainer.course.trained(steps_before),
    )
    with ExitStack() as stack:
        stack.enter_context(meter)
        stack.enter_context(interrupt.watch(meter))
        for model in (trainer.trained_model, getattr(trainer, "teacher", None)):
            if model is not None:
                stack.enter_context(counted_from_zero(model))
        trainer.add_callback(StageCallback(trainer, place.metrics, meter, interrupt, place.track))
        if trainer.profiles:
            trainer.add_callback(Traced(place.metrics.parent, place.name, trainer.args.device))
        with memory.watched(
            lambda: f"in stage '{place.name}'{place.part}, step {trainer.state.global_step + 1}",
            place.less_memory,
        ):
            trainer.train(resume_from_checkpoint=str(start) if start else None)
    if trainer.state.global_step < trainer.course.steps:
        # a launcher ends all with the first that ends, and one of them may still be writing
        processes.most([0])
        raise RunStopped(
            f"stopped in stage '{place.name}'{place.part} after step {trainer.state.global_step} of "
            f"{trainer.course.steps}; everything up to it is saved. Go on with:\n  {place.resume_command}",
            interrupt.exit_code,
        )


def _checkpointing(model: Any, on: bool) -> AbstractContextManager[None]:
    return _Checkpointing(model) if on else nullcontext()


class _Checkpointing:
    """Activation checkpointing inside a `with` block; transformers renamed the switch in 5.23."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.new = hasattr(model, "activation_checkpointing_enable")

    def __enter__(self) -> None:
        if self.new:
            self.model.activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
        else:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def __exit__(self, *_: object) -> None:
        if self.new:
            self.model.activation_checkpointing_disable()
        else:
            self.model.gradient_checkpointing_disable()
