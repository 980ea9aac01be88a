"""How long a stage's steps take on this machine: its own trainer on random tokens, at a learning rate of zero."""

from __future__ import annotations

import dataclasses
import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, set_seed

from linearize import models, objectives, surgery
from linearize.config.course import Course
from linearize.config.schedule import Over
from linearize.config.schema import Recipe, StageConfig
from linearize.distill import memory, processes, stages
from linearize.distill.placing import Place
from linearize.distill.preference import Pairs
from linearize.distill.teachers import apart
from linearize.models.unwrapped import unwrapped
from linearize.storing import PARTIAL

NEVER = 10**9
"""Steps between lines and checkpoints that are not written."""
DOCUMENT = 300
"""Tokens of a random document, where documents do not see each other."""


@dataclass(frozen=True)
class Timing:
    """What a stage takes, in seconds.

    Attributes:
        token: each, in the middle of the stage.
        first: what its first steps take beyond that, while kernels compile and a graph is recorded.
        save: each of its checkpoints.
    """

    token: float
    first: float
    save: float

    def seconds(self, stage: StageConfig, length: int) -> float:
        """Of a whole stage; its result is written as a checkpoint is."""
        course = Course.of(stage, length)
        return self.first + course.tokens * self.token + (1 + course.steps // stage.save_every) * self.save


class RandomText(Dataset[dict[str, Tensor]]):
    """Sequences of random tokens, in the form of a packed data set.

    Args:
        vocabulary: token ids are below it.
        length: tokens of a sequence.
        count: sequences.
        document: tokens of a document; by default a sequence is one.
    """

    def __init__(self, vocabulary: int, length: int, count: int, document: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(vocabulary, (count, length), generator=generator)
        self.document = document or length

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        positions = torch.arange(len(ids)) % self.document
        return {
            "input_ids": ids,
            "position_ids": positions,
            "labels": torch.where(positions == 0, -100, ids),
        }


def measured(
    source: str,
    recipe: Recipe,
    *,
    device: torch.device,
    autocast: torch.dtype | None,
    weights: torch.dtype,
    folder: Path,
) -> dict[str, Timing]:
    """Time some steps of every stage, one after the other on one model, as a run trains them.

    Args:
        source: the MODEL argument.
        recipe: its stages are timed as they are, in at most `memory.TOKENS` a step, which larger ones are parts of.
        device, autocast, weights: as the run has them.
        folder: on the disk that checkpoints go to.

    Returns:
        Each stage's timing; nothing of the model is left in memory.
    """

    set_seed(recipe.run.seed)
    model: Any
    model, _ = models.load_teacher(source, dtype=weights, device=str(device))
    model.requires_grad_(False)
    model = surgery.convert(model, recipe.mixer, recipe.layers, recipe.mixers).eval()
    original = Place(source, recipe, device, weights, autocast).original
    found: dict[str, Timing] = {}
    for name, stage in recipe.stages.items():
        timings = []
        course = Course.of(stage, recipe.data.of(stage).length)
        for batch, length in course.shapes:
            share = sum(
                phase.steps * phase.step_tokens
                for phase in course.phases
                if (phase.batch, phase.length) == (batch, length)
            )
            shares = processes.count()
            at_once = max(shares, min(batch, shares * memory.TOKENS // length))
            timing, model = _timed(
                model, name, _fixed(stage, at_once, length, course.steps), recipe, length,
                autocast=autocast, teacher=original if apart(recipe, name) else None, folder=folder, device=device,
            )  # fmt: skip
            timings.append((share / course.tokens, timing))
        found[name] = Timing(
            token=sum(share * timing.token for share, timing in timings),
            first=sum(timing.first for _, timing in timings),
            save=max(timing.save for _, timing in timings),
        )
    del model
    gc.collect()
    torch.compiler.reset()  # what it compiled is of modules that are gone
    memory.release(device)
    return found


def _fixed(stage: StageConfig, batch: int, length: int, steps: int) -> StageConfig:
    """The stage as long as it is, of one shape, without an effect and without a file."""
    fits = isinstance(stage.micro_batch, int) and batch % stage.micro_batch == 0
    return dataclasses.replace(
        stage,
        tokens=max(steps, WARM + LEAST + 1) * batch * length,
        batch_size=batch,
        micro_batch=stage.micro_batch if fits else "auto",
        lr=0.0,
        lr_mixers=None if stage.lr_mixers is None else 0.0,
        data=None,
        log_every=NEVER,
        save_every=NEVER,
    )


def _timed(
    model: nn.Module,
    name: str,
    stage: StageConfig,
    recipe: Recipe,
    length: int,
    *,
    autocast: torch.dtype | None,
    teacher: Callable[[], nn.Module] | None,
    folder: Path,
    device: torch.device,
) -> tuple[Timing, nn.Module]:
    text = _text(model, stage, recipe, length)
    clock = _Clock(device)
    with tempfile.TemporaryDirectory(dir=folder, prefix=PARTIAL) as scratch:
        opened = stages.training(
            model,
            stage,
            name=name,
            folder=Path(scratch),
            run=recipe.run,
            seed=recipe.run.seed,
            dataset=text,
            length=length,
            autocast=autocast,
            teacher=teacher,
        )
        with opened as trainer:
            model = trainer.trained_model
            trainer.add_callback(clock)
            shorter = f"Take a shorter {recipe.stages[name].length_key(name)}"
            advice = f"{shorter}, or gradient_checkpointing=true of the stage"
            with memory.watched(f"timing stage '{name}'", lambda: advice):
                trainer.train()
    model.requires_grad_(False)
    step_tokens = Over.of(stage.batch_size).most * length
    timing = Timing(clock.step / step_tokens, max(0.0, clock.first - clock.warm * clock.step), clock.save)
    return processes.alone(lambda: timing), model.eval()


def _text(model: Any, stage: StageConfig, recipe: Recipe, length: int) -> Dataset[dict[str, Tensor]]:
    vocabulary = unwrapped(model).get_input_embeddings().weight.shape[0]
    count = 4 * Over.of(stage.batch_size).most
    if objectives.level_of(stage.objective) != "pair":
        return RandomText(vocabulary, length, count, DOCUMENT if recipe.data.boundaries else None)
    ids = torch.randint(vocabulary, (length // 4,), generator=torch.Generator().manual_seed(0)).tolist()
    return Pairs([(ids, ids, ids)] * count, length=length, padding=0)


WARM = 6
"""Steps before a device is timed: kernels compile, the optimizer gets its moments, a graph is recorded."""
LEAST = 3
"""Steps that are timed at least."""
SPEND = 1.5
"""Seconds of timed steps."""


class _Clock(TrainerCallback):
    """Times a trainer's steps and one of its checkpoints, and stops it when it has seen enough."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.warm = WARM if device.type == "cuda" else 1
        self.least = LEAST if device.type == "cuda" else 2
        self.first = self.step = self.save = 0.0
        self._began = self._from = self._saving = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        timed = state.global_step - self.warm
        if timed == 0:
            self._from = self._now()
            self.first = self._from - self._began
        elif timed >= self.least and (self._enough() or state.global_step >= state.max_steps):
            self._saving = self._now()
            self.step = (self._saving - self._from) / timed
            control.should_save = control.should_training_stop = True
        else:
            control.should_save = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.save = self._now() - self._saving

    def _enough(self) -> bool:
        """Whether the first process has timed for long enough, for all of several."""
        return processes.alone(lambda: time.monotonic() - self._from > SPEND)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()
