"""The mixers' start in closed form, block after block: what `distill.calibrate` does with the whole model.

A whole run tries one way after the other, and what the last one does depends on which of those before came nearer. Here
the students of all ways that there might be go through a block side by side, beside the teacher, before the next block
is loaded; behind the last one the head says which a whole run would have tried, and which is nearest. Between two
blocks all that is needed stands in one file, from which a process that was killed goes on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from linearize import storing, surgery
from linearize.distill import calibrate as whole
from linearize.distill.blockwise.block import Block
from linearize.distill.blockwise.job import Job
from linearize.distill.identity import digest
from linearize.distill.positions import counted_from_zero
from linearize.progress import Meter

TEACHER = "teacher"
STATE = ".partial-streams.safetensors"
"""Between two blocks; it goes with what a cut-off process leaves where it is not needed any more."""
KINDS = ("fitted", "judged")


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
    storing.make_folder(folder)
    sweep = _Sweep(job, *whole.sequences(dataset, job.device), digest(dataset))
    layers = len(sweep.ways) * len(job.maker.layers_converted)
    with torch.no_grad(), Meter("calibrate", layers, "layers") as meter:
        for number in range(sweep.begun(), len(job.blocks)):
            sweep.block(number, meter)
        mixers, found = sweep.best()
    whole.write_mixers({name: mixers[name] for name in job.maker.names}, folder, found)
    storing.remove(folder / STATE)


@dataclass
class _Stream:
    """Between two blocks: hidden states [B, T, D], and the first converted layer's values where they are mixed."""

    hidden: Tensor
    values: Tensor | None = None


class _Sweep:
    """All streams on their way, and what the students' mixers are.

    Attributes:
        ways: all that a whole run might try.
        fitted: the teacher's stream, and for a way with streams of its own the teacher's and the student's together,
            as they go through a whole model.
        judged: the streams of teacher, start and what each way has made of it.
        mixers, found: of start and ways.
    """

    def __init__(self, job: Job, fitted: dict[str, Tensor], judged: dict[str, Tensor], text: str) -> None:
        self.job, self.texts, self.text = job, {"fitted": fitted, "judged": judged}, text
        names = job.maker.names
        self.ways = whole.every_way(whole.has_outputs(names), whole.has_windows(names))
        self.fitted: dict[str, _Stream] = {}
        self.judged: dict[str, _Stream] = {}
        self.mixers: dict[str, dict[str, Tensor]] = {}
        self.found: dict[str, list[dict[str, float]]] = {}

    def begun(self) -> int:
        """The block that comes next; reads what an earlier process has left."""
        if (said := _left(self.job.calibration / STATE)) and said[0].get("text") == self._text():
            for key, tensor in said[1].items():
                kind, name, part = key.split("/", 2)
                if kind == "mixers":
                    self.mixers.setdefault(name, {})[part] = tensor
                else:
                    stream = getattr(self, kind).setdefault(name, _Stream(tensor))
                    setattr(stream, part, tensor.to(self.job.device))
            self.found = json.loads(said[0]["found"])
            return int(said[0]["blocks"])
        table = self.job.maker.table()
        with counted_from_zero(table.whole), self.job.maker.computing():
            fitted, judged = (table.embed(text["input_ids"], text) for text in self.texts.values())
        own = [way.name for way in self.ways if way.own_stream]
        self.fitted = {TEACHER: _Stream(fitted), **{name: _Stream(fitted.repeat(2, 1, 1)) for name in own}}
        students = [whole.START, *(way.name for way in self.ways)]
        self.judged = {name: _Stream(judged) for name in (TEACHER, *students)}
        self.mixers = {name: {} for name in students}
        self.found = {name: [] for name in students}
        return 0

    def block(self, number: int, meter: Meter) -> None:
        """Take all streams through a block, whose mixers are set in every way."""
        job, teacher = self.job, self.fitted[TEACHER]
        said = teacher.hidden, self.texts["fitted"], teacher.values
        block = job.maker.block(job.blocks[number], job.said["tuples"], *said)
        job.said["tuples"] = block.tuples
        job.learned(job.maker)
        if block.places:
            states = self._set(block, meter)
            self._judge(block, states)
        else:
            with job.maker.computing():
                self.fitted = {name: self._through(block, name) for name in self.fitted}
                self.judged = {name: self._rows(block, stream) for name, stream in self.judged.items()}
        self._save(number + 1)

    def _set(self, block: Block, meter: Meter) -> dict[str, dict[str, Tensor]]:
        """Mixers by way, as they come out; a way whose own stream overflows has none."""
        states = {whole.START: whole.state(block)}
        behind: dict[str, _Stream] = {}
        for way in self.ways:
            name = way.name if way.own_stream else TEACHER
            if name not in self.fitted:
                continue
            surgery.load_mixer_state(block, way.begin(states))
            rows: list[dict[str, float]] = []
            observer = whole.observer(rows, way.own_stream, meter, **way.how)
            with way.may_overflow(), self.job.maker.computing(), surgery.observe(block, observer):
                behind[name] = self._through(block, name)
                states[way.name] = whole.state(block)
                self.found[way.name] += rows
        self.fitted = behind
        return states

    def _judge(self, block: Block, states: dict[str, dict[str, Tensor]]) -> None:
        """Take what is judged through a block that is set."""
        behind: dict[str, _Stream] = {}
        for name in (TEACHER, *states):
            if name != TEACHER:
                surgery.load_mixer_state(block, states[name])
                self.mixers[name] |= {key: value.cpu() for key, value in states[name].items()}
            mode = "teacher" if name == TEACHER else "student"
            with self.job.maker.computing(), surgery.mode(block, mode):
                behind[name] = self._rows(block, self.judged[name])
        self.judged = behind

    def _through(self, block: Block, name: str) -> _Stream:
        """A stream of what is fitted, all sequences at once."""
        text = self.texts["fitted"]
        return _run(block, self.fitted[name], text if name == TEACHER else whole.twice(text))

    def _rows(self, block: Block, stream: _Stream) -> _Stream:
        """A stream of what is judged, a sequence at a time, as distributions are compared."""
        found = []
        for row in range(len(stream.hidden)):
            one = {key: value[row : row + 1] for key, value in self.texts["judged"].items()}
            values = None if stream.values is None else stream.values[row : row + 1]
            found.append(_run(block, _Stream(stream.hidden[row : row + 1], values), one))
        first = [each.values for each in found if each.values is not None]
        return _Stream(torch.cat([each.hidden for each in found]), torch.cat(first) if first else None)

    def _text(self) -> str:
        """What the streams are of."""
        return " ".join([self.text, *(way.name for way in self.ways)])

    def _save(self, done: int) -> None:
        job = self.job
        tensors: dict[str, Tensor] = {}
        for kind in KINDS:
            for name, stream in getattr(self, kind).items():
                tensors[f"{kind}/{name}/hidden"] = stream.hidden
                if stream.values is not None:
                    tensors[f"{kind}/{name}/values"] = stream.values
        for name in self.judged:
            for key, value in self.mixers.get(name, {}).items():
                tensors[f"mixers/{name}/{key}"] = value
        job.write()
        said = {"blocks": str(done), "found": json.dumps(self.found), "text": self._text()}
        storing.write_tensors_file(job.calibration / STATE, tensors, said)

    def best(self) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        """The mixers that a whole run would have kept, and its layers' errors."""
        head = self.job.maker.head(self.job.said["tuples"])
        rows: dict[str, list[float]] = {name: [] for name in self.judged if name != TEACHER}
        with self.job.maker.computing():
            for row in range(len(self.judged[TEACHER].hidden)):
                one = {key: value[row : row + 1] for key, value in self.texts["judged"].items()}
                teacher = head.finish(self.judged[TEACHER].hidden[row : row + 1], one)[0]
                for name, found in rows.items():
                    student = head.finish(self.judged[name].hidden[row : row + 1], one)[0]
                    found.append(whole.divergence(teacher, student))
        away = {name: whole.over(found) for name, found in rows.items()}
        tried = [
            whole.START,
            *(
                way.name
                for way in whole.ways(away, *(way in self.ways for way in (whole.PLAIN, whole.LOWERED[0])))
            ),
        ]
        chosen = whole.nearest({name: away[name] for name in tried if name in away})
        return self.mixers[chosen], self.found[chosen]


def _run(block: Block, stream: _Stream, text: dict[str, Tensor]) -> _Stream:
    hidden, values = block.run(stream.hidden, text, stream.values)
    return _Stream(hidden, values if stream.values is None else stream.values)


def _left(path: Path) -> tuple[dict[str, str], dict[str, Tensor]] | None:
    """What an earlier process has written between two blocks."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def load_start(job: Job, block: Any) -> None:
    """Put the calibrated start into a block, if there is one.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    if job.calibrates:
        whole.restore(block, job.calibration, part=True)
