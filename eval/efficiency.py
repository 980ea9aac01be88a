"""Time and memory against context and batch: prefill, and decoding as `linearize generate` does it.

A converted model on a GPU decodes in one CUDA graph, everything else through transformers' generate, which is what its
user would get, both in bfloat16; `linearize bench decode` has further ways, compiled ones among them. The tokens
are random: what is timed does not depend on them.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from linearize import surgery
from linearize.decode.ways import Point, cache_bytes, generate, graph, half, prompt, room
from linearize.eval.measurement import Call, Setting, score
from linearize.eval.recall.answering import Cached
from linearize.eval.rows import STUDENT, TEACHER, Score, key_of
from linearize.eval.suite import Takes, Unit
from linearize.mixers.offloaded import device_of

log = logging.getLogger(__name__)


class Efficiency:
    """Settings: `batches`; `repeats` of a prefill or `steps` of decoding; `cpu_most`, the longest context on a CPU.

    Args:
        task: prefill or decode.
    """

    reads: ClassVar = False
    compares: ClassVar = False

    def __init__(self, task: str) -> None:
        self.task = task
        self.takes: dict[str, Takes] = {
            "length": Takes(),
            "batches": Takes(several=True),
            "repeats" if task == "prefill" else "steps": Takes(),
            "cpu_most": Takes(needed=False),
        }

    def room(self, unit: Unit) -> int:
        """What is decoded."""
        return int(unit.settings.get("steps", 0))

    def units(self, unit: Unit, setting: Setting) -> Sequence[Unit]:
        """The unit; nothing where the context is too long for a CPU."""
        return [unit] if setting.device != "cpu" or unit.length <= unit.settings.get("cpu_most", 1024) else []

    def tokens(self, unit: Unit, setting: Setting) -> int:
        """Of every repetition and batch."""
        return sum(self._tokens(unit, batch, setting) for batch in self._batches(unit, setting))

    def measure(self, model: Any, call: Call, setting: Setting, meter: Any) -> list[Score]:
        """Milliseconds, tokens a second, bytes of one sequence's cache, and on a GPU the most memory."""
        made = []
        device = device_of(model)
        if device.type == "cuda":  # as it would be used there
            model = half(copy.deepcopy(model))
        for batch in self._batches(call.unit, setting):
            try:
                with room(device):
                    made += self._one(model, call.unit, batch, device)
            except torch.OutOfMemoryError:
                log.info(
                    "%s: %s of %d x %d tokens does not fit",
                    call.entrant.role,
                    self.task,
                    batch,
                    call.unit.length,
                )
            meter.advance(self._tokens(call.unit, batch, setting))
        return made

    def _batches(self, unit: Unit, setting: Setting) -> Sequence[int]:
        return unit.settings["batches"][: 1 if setting.device == "cpu" else None]

    def _tokens(self, unit: Unit, batch: int, setting: Setting) -> int:
        if self.task == "prefill":
            return batch * unit.length * (1 + unit.settings["repeats"])
        return batch * unit.length + setting.step * unit.settings["steps"]

    def _one(self, model: Any, unit: Unit, batch: int, device: torch.device) -> list[Score]:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        point = Point(batch, unit.length, unit.settings.get("steps", 1))
        if self.task == "prefill":
            seconds, held = _prefill(model, point, unit.settings["repeats"], device)
            tokens, n = batch * unit.length, len(seconds)
        else:
            way = (
                graph(model, None) if device.type == "cuda" and surgery.converted(model) else generate(model)
            )
            one, held = way(point)
            seconds, tokens, n = [one], batch, unit.settings["steps"]
        middle = float(np.median(seconds))
        ends = (min(seconds), max(seconds)) if len(seconds) > 1 else (None, None)
        here = partial(score, by="batch", bucket=str(batch))
        slow, fast = (None if end is None else 1e3 * end for end in ends)
        made = [
            here("milliseconds", 1e3 * middle, (slow, fast), n),
            here("tokens_per_second", tokens / middle, n=n),
        ]
        if held:  # none where the forward takes no cache of transformers
            made.append(here("cache_bytes", held / batch, n=1))
        if device.type == "cuda":
            made.append(here("peak_bytes", torch.cuda.max_memory_allocated(device), n=1))
        return made


def _prefill(model: Any, point: Point, repeats: int, device: torch.device) -> tuple[list[float], int]:
    """Seconds of each repetition, the first, untimed one left out; and bytes of the cache."""
    ids, seconds, held = prompt(model, point), [], 0
    for number in range(repeats + 1):
        read = Cached(model)
        started = _now(device)
        read(ids)
        if number:
            seconds.append(_now(device) - started)
        held = cache_bytes(read.cache)
    return seconds, held


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def crossovers(rows: Sequence[Score]) -> list[Score]:
    """From which measured context on the student is faster, or its cache smaller, at every longer one as well.

    Args:
        rows: of an efficiency suite.

    Returns:
        Rows of the student, one for each task, metric and batch; none where the student never gets there.
    """
    made = []
    for task, metric, batch in dict.fromkeys((row.task, row.metric, row.bucket) for row in rows):
        if metric not in ("milliseconds", "cache_bytes"):
            continue
        values: dict[str, dict[int, Score]] = {STUDENT: {}, TEACHER: {}}
        for row in rows:
            if (row.task, row.metric, row.bucket) == (task, metric, batch) and row.role in values:
                values[row.role][row.length or 0] = row
        both = sorted(set(values[STUDENT]) & set(values[TEACHER]))
        ahead: list[int] = []
        for length in reversed(both):
            if values[STUDENT][length].value >= values[TEACHER][length].value:  # as much is no gain
                break
            ahead.insert(0, length)
        if ahead:
            first = values[STUDENT][ahead[0]]
            keys = sorted(row.key for role in values.values() for row in role.values())
            made.append(
                replace(
                    first,
                    task=f"{task}, {metric}",
                    metric="crossover",
                    value=float(ahead[0]),
                    n=len(both),
                    key=key_of("crossover", task, metric, batch, keys),
                    low=None,
                    high=None,
                    length=None,
                    against=TEACHER,
                )
            )
    return made
