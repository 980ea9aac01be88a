"""The engine of every stage: transformers.Trainer with our checkpoints, our losses and a stop on NaN.

Kept from Trainer: the loop, trackers, callbacks. Replaced: gradient accumulation, by passes over parts of one batch
(`micro`); what a checkpoint holds (only what trains, no pickles, complete or absent); and mixed precision, which wraps
the passes here instead of patching the model's forward for good.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments

from linearize import launched, storing, surgery
from linearize.config.changing import changing
from linearize.config.course import Course
from linearize.config.schedule import Over
from linearize.config.schema import RunConfig, StageConfig
from linearize.distill import non_finite, pieces, processes, shards, state, together, window_dropout
from linearize.distill.batches import Batches, only, part
from linearize.distill.callbacks import Interrupt
from linearize.distill.micro import MicroBatch
from linearize.distill.optimizer import build_optimizer, build_scheduler
from linearize.distill.passes import Passes
from linearize.distill.pieces import Pieces
from linearize.distill.sequences import Sequences
from linearize.distill.trainable import mixer_parameters, trained
from linearize.distill.window_dropout import Draw, Off
from linearize.errors import NonFiniteLossError

KEPT_CHECKPOINTS = 2
"""The newest, and one more in case the newest is damaged."""


class StageTrainer(Trainer):
    """Base of the two kinds of stages; a subclass gives `micro_step`.

    Args:
        model: prepared by `trainable.prepare`.
        name: the stage's name in the recipe.
        stage: its settings.
        run: seed and workers.
        folder: the stage's folder; checkpoints go there.
        dataset: packed sequences (data.packed).
        length: tokens in a sequence, the longest where the stage has several.
        seed: of this stage.
        device: where it runs.
        autocast: compute dtype of the passes, or None for the parameters' own.

    Attributes:
        course: the stage's steps.
        interrupt: what this process is asked for meanwhile.
        off: whether each converted layer's window is off in the step, in all parts of its batch alike, or in recorded
            passes what says so on the device; [] is none.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        stage: StageConfig,
        run: RunConfig,
        folder: Path,
        dataset: Any,
        length: int,
        seed: int,
        device: torch.device,
        autocast: torch.dtype | None,
    ) -> None:
        self.trained_model = model
        self.stage_name = name
        self.stage = stage
        self.seed, self.autocast_dtype = seed, autocast
        self.course = Course.of(stage, length)
        self.off: Sequence[Off] = []
        self.drops_windows = Over.of(stage.window_dropout).most > 0
        self.droppable = self.find_droppable(model) if self.drops_windows else []
        self.profiles = run.profile
        self.in_shards = shards.in_shards(model)
        self.parameters = trained(model)
        self.plain = [p for p in self.parameters.values() if not shards.is_sharded(p)]
        self._names = {parameter: key for key, parameter in self.parameters.items()}
        self._step_values: Tensor | None = None
        self._window_values: Tensor | None = None
        self._window_steps = 0
        self._step_lr: dict[str, float] = {}
        self._changing: dict[str, Any] = {}
        self._step_norm: Tensor | float = 0.0
        self.stage_folder = folder
        self.interrupt = Interrupt()
        self.sequences = Sequences(run, device)
        shares, share, together = self.sequences.shares, self.sequences.share, self.sequences.size > 1
        own = [(len(part(batch, share, shares)), length) for batch, length in self.course.shapes]
        self.micro = MicroBatch(stage, name, own, device, alone=not (self.in_shards or together))
        self.passes = Passes(
            model,
            name,
            stage,
            run,
            device,
            self.course.steps,
            list(self.parameters.values()),
            self.compiled_parts,
            spread=together,
        )
        self.adamw = build_optimizer(
            self.parameters, stage, fused=device.type == "cuda", mixers=mixer_parameters(model)
        )
        self.schedule = build_scheduler(self.adamw, stage, self.course)
        super().__init__(
            model=model,
            args=_arguments(stage, run, folder, self.course, seed, device),
            data_collator=only,
            train_dataset=Batches(dataset, self.course, seed, shares, self.sequences.size),
            optimizers=(self.adamw, self.schedule),
        )
        self.remove_callback(PrinterCallback)
        # placed, but not wrapped: see `together`
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        processes.same(self.plain)

    def now(self, value: Any) -> Any:
        """What a field that may change within a stage (`schedule`) is at this step."""
        return self.course.value(Over.of(value), self.state.global_step)

    def _draw_windows(self) -> Draw:
        if not self.drops_windows:
            return Draw()
        rate, step = self.now(self.stage.window_dropout), self.state.global_step
        drawn = self.draw(rate, step)
        off = [able and off for able, off in zip(self.droppable, drawn, strict=True)]
        return Draw(off, self.droppable, rate in (0, 1))

    # What a subclass gives

    def micro_step(self, model: nn.Module, batch: dict[str, Tensor], count: Tensor | None) -> Tensor:
        """Forward and backward on one micro-batch; gradients are added to the parameters.

        Args:
            model: the model.
            batch: input_ids, position_ids, labels, each [B, T], on the device; B is `micro.size`.
            count: labeled tokens of all sequences of this optimizer step, scalar.

        Returns:
            Detached losses [N], one for a converted layer or one in all, that sum over the step's
            micro-batches to the step's losses.
        """
        raise NotImplementedError

    def find_droppable(self, model: nn.Module) -> list[bool]:
        """Which converted layers can have their window off, see `window_dropout.check`."""
        return window_dropout.check(surgery.converted(model))

    def draw(self, rate: float, step: int) -> list[bool]:
        """Which converted layers have their window off in a step, those that cannot among them."""
        return window_dropout.draws(rate, len(self.droppable), self.seed, step)

    def clip(self, norm: Tensor) -> None:
        """Scale the gradients, whose norm is `norm`, to `grad_clip`."""
        shards.clip(self.parameters.values(), self.args.max_grad_norm, norm)

    def compiled_parts(self) -> Sequence[Any]:
        """What may be compiled in a micro-step, see `blocks`."""
        return []

    def around_pass(self) -> AbstractContextManager[None]:
        """What `micro_step` stands in."""
        return nullcontext()

    def where_not_finite(self, values: list[float]) -> str:
        """Which of the step's losses is not finite, in words."""
        return f"the loss is {values[0]}"

    # The step

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        batch, phase = self._prepare_inputs(inputs), self.course.phase(self.state.global_step)
        draw = self._draw_windows()
        processes.random_apart(self.seed, self.state.global_step)
        run = partial(self._pass, model)
        with processes.in_pass():
            self._step_values = self.micro.run(
                batch,
                # a share of the batch is a number of the recording
                lambda part: self.passes(run, part, num_items_in_batch, draw, phase.batch),
                undo=self._begin_again,
                looks=partial(self.passes.looks, batch),
            )
        window_dropout.forget(surgery.converted(self.trained_model) if draw.off else [], draw.off)
        rows = tuple(batch["input_ids"].shape)
        together.join(self.plain, self._step_values, self.micro, rows, self.interrupt)
        return self._step_values.mean().to(self._tr_loss.dtype)

    def _pass(
        self, model: nn.Module, batch: dict[str, Tensor], count: Tensor | None, off: Sequence[Off]
    ) -> Tensor:
        """`micro_step` with the windows that are drawn off."""
        self.off = off
        with self.around_pass():
            return self.micro_step(model, batch, count)

    def _begin_again(self) -> None:
        """Forget a step's gradients, and a recording of passes that were too large."""
        self.passes.captured.release()
        self.trained_model.zero_grad(set_to_none=True)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        return None

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Check that losses and gradients are finite, then clip. The one place a step waits for the device."""
        assert self._step_values is not None
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        with processes.in_pass():
            norm = shards.total_norm(gradients)
            finite = bool(torch.stack([self._step_values.isfinite().all(), norm.isfinite()]).all())
        if not finite:
            self._stop_on_non_finite()
        self.clip(norm)
        self._window_values = (
            self._step_values if self._window_values is None else self._window_values + self._step_values
        )
        self._window_steps += 1
        self._step_values = None
        self._step_norm, self._step_lr = norm, self._rates()
        self._changing = self._changes()
        return norm

    def take_window(self) -> dict[str, Any]:
        """Averages since the last call: loss, lr and gradient norm of the last step; subclasses add to it."""
        assert self._window_values is not None
        values = (self._window_values / self._window_steps).tolist()
        self._window_values, self._window_steps = None, 0
        return {
            "loss": sum(values) / len(values),
            **self._step_lr,
            **self._changing,
            "grad_norm": float(self._step_norm),
            **self.describe(values),
        }

    def _rates(self) -> dict[str, float]:
        """The learning rates in use; the mixers' own where they have one."""
        first, last = self.adamw.param_groups[0]["lr"], self.adamw.param_groups[-1]["lr"]
        return {"lr": first} if self.stage.lr_mixers is None else {"lr": first, "lr_mixers": last}

    def _changes(self) -> dict[str, Any]:
        """What changes within this stage, as it is at this step."""
        found = changing("", self.stage)
        names = {key.rpartition(".")[2]: over for key, over in found.items() if not over.constant}
        return {name: self.course.value(over, self.state.global_step) for name, over in names.items()}

    def describe(self, values: list[float]) -> dict[str, Any]:
        """Further fields of a metrics line, from the averaged losses."""
        return {}

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Autocast for a pass. No cache: a cast made under no_grad must not serve a pass with gradients."""
        if self.autocast_dtype is None:
            yield
        else:
            with torch.autocast(self.args.device.type, dtype=self.autocast_dtype, cache_enabled=False):
                yield

    def _stop_on_non_finite(self) -> None:
        assert self._step_values is not None
        values = self._step_values.tolist()
        if all(math.isfinite(value) for value in values):
            what = non_finite.in_gradients(self.parameters)
        else:
            what = self.where_not_finite(values)
        last = storing.latest(self.stage_folder)
        shards.settle(self.trained_model)
        raise NonFiniteLossError(
            f"stage '{self.stage_name}', step {self.state.global_step + 1}: {what}. The step was not applied. "
            f"Last good checkpoint: {last or 'none of this stage yet'}. "
            f"{non_finite.advice(self.trained_model, self.stage_name, self.stage, self.state.global_step)}"
        )

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        if not launched.first() and not self.in_shards:
            return
        folder = self.stage_folder / f"checkpoint-{self.state.global_step}"
        tensors: dict[str, Mapping[str, Tensor]] = {
            "trained.safetensors": self.parameters,
            "optimizer.safetensors": state.optimizer_tensors(self.adamw, self._names),
        }
        if self.in_shards:
            pieces.write_folder(folder, tensors, self._write_state)
        else:
            storing.write_folder(folder, partial(self._write_all, tensors))
        if launched.first():
            storing.prune(self.stage_folder, KEPT_CHECKPOINTS)

    def _write_all(self, tensors: dict[str, Mapping[str, Tensor]], folder: Path) -> None:
        for name, given in tensors.items():
            storing.write_tensors(folder / name, given)
        self._write_state(folder)

    def _write_state(self, folder: Path) -> None:
        storing.write_tensors(folder / "rng.safetensors", state.rng_tensors())
        window = {} if self._window_values is None else {"values": self._window_values}
        storing.write_tensors(folder / "window.safetensors", window)
        self.state.save_to_json(str(folder / storing.STATE))
        scheduler = self.schedule.state_dict()
        storing.write_json(
            folder / "state.json",
            {
                "lr": [group["lr"] for group in self.adamw.param_groups],
                "scheduler": {key: scheduler[key] for key in ("last_epoch", "_step_count")},
                "rng": state.rng_numbers(),
                "window_steps": self._window_steps,
                "micro_batch": self.micro.sizes_found(),
            },
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        pieces.load(self.trained_model, Pieces(Path(resume_from_checkpoint) / "trained.safetensors"))

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is None:
            return
        folder = Path(checkpoint_folder)
        saved = state.read(folder)
        state.load_optimizer_tensors(self.adamw, Pieces(folder / "optimizer.safetensors"), self._names)
        state.load_rates(self.adamw, self.schedule, saved)
        window = storing.read_tensors(folder / "window.safetensors").get("values")
        self._window_values = None if window is None else window.to(self.args.device)
        self._window_steps = saved["window_steps"]
        self.micro.remember(saved.get("micro_batch"))

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            folder = Path(checkpoint_folder)
            numbers = state.read(folder)["rng"]
            state.restore_rng(storing.read_tensors(folder / "rng.safetensors"), numbers)

    # Trainer's defaults that do not fit

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        assert isinstance(self.train_dataset, Batches)
        return SequentialSampler(self.train_dataset)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the original counts all parameters on every micro-batch

    def store_flos(self) -> None:
        pass  # the original asks the others for theirs, on the device, and waits there for one that is still writing


def _arguments(
    stage: StageConfig, run: RunConfig, folder: Path, course: Course, seed: int, device: torch.device
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=course.steps,
        per_device_train_batch_size=1,  # an item of `Batches` is all sequences of a step
        learning_rate=stage.lr,
        max_grad_norm=stage.grad_clip or math.inf,
        logging_steps=stage.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=stage.save_every,
        seed=seed,
        dataloader_num_workers=workers(run, device),
        dataloader_pin_memory=device.type == "cuda",
        accelerator_config={"non_blocking": True},
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        average_tokens_across_devices=False,
        disable_tqdm=True,
        log_level_replica="passive",  # as the first process
        report_to=[],  # see `tracking`
    )
    # One process drives one device: else Trainer would spread the batch over all GPUs with DataParallel.
    assert arguments.device.type == device.type
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def workers(run: RunConfig, device: torch.device) -> int:
    """Processes of the data loader: `run.workers`."""
    if run.workers != "auto":
        return int(run.workers)
    return min(2, (os.cpu_count() or 1) - 1) if device.type == "cuda" else 0
