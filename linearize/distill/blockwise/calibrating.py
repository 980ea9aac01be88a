"""The mixers' start in closed form, block after block: what `distill.calibrate` does with the whole model.

That asks three passes over all layers, of the student as it starts, of one that is set on its own stream and of one
that is set on the teacher's. Here the three students go through a block side by side, beside the teacher, before the
next block is loaded; behind the last one the head says which of them is nearest. Between two blocks all that is needed
stands in one file, from which a process that was killed goes on.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor

from linearize import storing, surgery
from linearize.distill import calibrate as whole
from linearize.distill.blockwise.block import INPUTS, Block
from linearize.distill.blockwise.job import Job, digest
from linearize.distill.positions import counted_from_zero
from linearize.errors import NotFiniteError
from linearize.progress import Meter

STREAMS = ("teacher", "start", "own", "given")
"""The teacher, and students: untouched, set on what set layers before them give, set on the teacher's stream."""
STATE = ".partial-streams.safetensors"
"""Between two blocks; it goes with what a cut-off process leaves where it is not needed any more."""


def calibrate(job: Job) -> None:
    """Find the start of all mixers and write it into the run folder, unless it is there.

    Args:
        job: its folder is made.

    Raises:
        NotFiniteError: as `distill.calibrate`.
        CheckpointError: the disk is full or refuses.
    """
    folder = job.calibration
    if whole.is_done(folder):
        return
    dataset = whole.text(job.recipe, job.tokenizer)
    items = [dataset[index] for index in range(len(dataset))]
    batch = {
        key: torch.stack([torch.as_tensor(item[key]) for item in items]).to(job.device)
        for key in ("input_ids", *INPUTS)
        if key in items[0]
    }
    storing.make_folder(folder)
    sweep = _Sweep(job, batch, digest(dataset))
    with torch.no_grad(), Meter("calibrate", len(job.maker.layers_converted), "layers") as meter:
        for number in range(sweep.begun(), len(job.blocks)):
            sweep.block(number, meter)
        mixers, found = sweep.best()
    whole.write_mixers({name: mixers[name] for name in job.maker.names}, folder, found)
    storing.remove(folder / STATE)


class _Sweep:
    """The four streams on their way, and what the students' mixers are."""

    def __init__(self, job: Job, batch: dict[str, Tensor], text: str) -> None:
        self.job, self.batch, self.text = job, batch, text
        self.streams: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.mixers: dict[str, dict[str, Tensor]] = {name: {} for name in STREAMS[1:]}
        self.found: dict[str, list[dict[str, float]]] = {"own": [], "given": []}

    @property
    def names(self) -> list[str]:
        """The students that are left: one whose own stream overflows is out."""
        return [name for name in STREAMS if name in self.streams]

    def begun(self) -> int:
        """The block that comes next; reads what an earlier process has left."""
        if (said := _left(self.job.calibration / STATE)) and said[0].get("text") == self.text:
            for key, tensor in said[1].items():
                kind, _, name = key.partition("/")
                if kind in ("streams", "values"):
                    getattr(self, kind)[name] = tensor.to(self.job.device)
                else:
                    self.mixers[kind][name] = tensor
            self.found = json.loads(said[0]["found"])
            return int(said[0]["blocks"])
        table = self.job.maker.table()
        with counted_from_zero(table.whole), self.job.maker.computing():
            stream = table.embed(self.batch["input_ids"], self.batch)
        self.streams = dict.fromkeys(STREAMS, stream)
        return 0

    def block(self, number: int, meter: Meter) -> None:
        """Take all streams through a block."""
        job, numbers = self.job, self.job.blocks[number]
        inside = job.maker.hands is not None and job.maker.hands < numbers[0]
        values = self.values if inside else {}
        block = job.maker.block(
            numbers, job.said["tuples"], self.streams["teacher"], self.batch, values.get("teacher")
        )
        job.said["tuples"] = block.tuples
        job.learned(job.maker)
        handed: dict[str, Tensor] = {}
        if block.places:
            behind = self._converted(block, values, handed, meter)
        else:
            behind = {}
            with job.maker.computing():
                for name in self.names:
                    if name == "teacher":
                        behind[name], _ = block.run(self.streams[name], self.batch)
                    else:
                        behind[name], _ = self._rows(block, name, values)
        self.streams = behind
        self.values = self.values if inside else handed
        self._save(number + 1)

    def _converted(
        self, block: Block, values: dict[str, Tensor], handed: dict[str, Tensor], meter: Meter
    ) -> dict[str, Tensor]:
        """A block with mixers, which are set on the way."""
        behind: dict[str, Tensor] = {}
        start = _state(block)
        states = {"start": start}
        both = {key: value.repeat(2, 1) for key, value in self.batch.items()}
        computing = self.job.maker.computing
        if "own" in self.streams:
            pair = torch.cat([self.streams["teacher"], self.streams["own"]])
            given = torch.cat([values["teacher"], values["own"]]) if values else None
            rows: list[dict[str, float]] = []
            try:
                silent = Meter("", None, console=Console(quiet=True))
                with computing(), surgery.observe(block, whole.observer(rows, True, silent)):
                    out, first = block.run(pair, both, given)
                behind["own"] = out.chunk(2)[1]
                states["own"] = _state(block)
                self.found["own"] += rows
                if first is not None:
                    handed["own"] = first.chunk(2)[1]
            except NotFiniteError:
                pass  # as in a whole run: sixteen bits may overflow behind poor layers
            surgery.load_mixer_state(block, start)
        rows = []
        with computing(), surgery.observe(block, whole.observer(rows, False, meter)):
            behind["teacher"], first = block.run(self.streams["teacher"], self.batch, values.get("teacher"))
        self.found["given"] += rows
        states["given"] = _state(block)
        if first is not None:
            handed["teacher"] = first
        for name in ("start", "given"):
            surgery.load_mixer_state(block, states[name])
            with computing(), surgery.mode(block, "student"):
                behind[name], first = self._rows(block, name, values)
            if first is not None:
                handed[name] = first
        for name, state in states.items():
            self.mixers[name] |= {key: value.cpu() for key, value in state.items()}
        return behind

    def _rows(self, block: Block, name: str, values: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """A student's stream, a sequence at a time, as distributions are compared."""
        outs, firsts = [], []
        for row in range(len(self.streams[name])):
            one = {key: value[row : row + 1] for key, value in self.batch.items()}
            taken = values[name][row : row + 1] if name in values else None
            out, first = block.run(self.streams[name][row : row + 1], one, taken)
            outs.append(out)
            firsts += [] if first is None else [first]
        return torch.cat(outs), torch.cat(firsts) if firsts else None

    def _save(self, done: int) -> None:
        job = self.job
        tensors = {f"streams/{name}": value for name, value in self.streams.items()}
        tensors |= {f"values/{name}": value for name, value in self.values.items()}
        for kind, held in self.mixers.items():
            if kind in self.streams:
                tensors |= {f"{kind}/{name}": value for name, value in held.items()}
        job.write()
        said = {"blocks": str(done), "found": json.dumps(self.found), "text": self.text}
        storing.write_tensors_file(job.calibration / STATE, tensors, said)

    def best(self) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        """The mixers of the student whose distributions are nearest the teacher's, and its layers' errors."""
        head = self.job.maker.head(self.job.said["tuples"])
        away = dict.fromkeys(self.names[1:], 0.0)
        with self.job.maker.computing():
            for row in range(len(self.streams["teacher"])):
                one = {key: value[row : row + 1] for key, value in self.batch.items()}
                logits = {
                    name: head.finish(stream[row : row + 1], one)[0] for name, stream in self.streams.items()
                }
                for name in away:
                    away[name] += whole.divergence(logits["teacher"], logits[name])
        chosen, least = "start", _known(away["start"])
        for name in ("own", "given"):  # in this order, as a whole run tries them
            if name in away and _known(away[name]) < least:
                chosen, least = name, away[name]
        return self.mixers[chosen], self.found.get(chosen, [])


def _left(path: Path) -> tuple[dict[str, str], dict[str, Tensor]] | None:
    """What an earlier process has written between two blocks."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def _known(value: float) -> float:
    return value if value == value else math.inf


def _state(block: Block) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in surgery.mixer_state(block).items()}


def load_start(job: Job, block: Any) -> None:
    """Put the calibrated start into a block, if there is one.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    if job.calibrates:
        whole.restore(block, job.calibration, part=True)
