"""KL to the teacher of a converted model some of whose layers are the teacher's, each placement measured once."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize import surgery
from linearize.errors import CheckpointError, NotFiniteError
from linearize.eval.intervals import bootstrap
from linearize.eval.measurement import score
from linearize.eval.rows import TEACHER, Score, Scores, key_of
from linearize.eval.token_scores import Predictor, score_tokens
from linearize.select.placement import Kept
from linearize.select.prefix import Shortened
from linearize.select.samples import Sample
from linearize.storing import read_tensors, write_tensors_file
from linearize.version import __version__


class _Teacher(Predictor):
    """The converted model with every layer as the teacher, whatever its layers are outside."""

    def windows(self, ids: Tensor, *, keep: bool = False) -> Any:
        with surgery.as_teacher_layers(self.model, _numbers(self.model)):
            return super().windows(ids, keep=keep)


@dataclass(frozen=True)
class Signature:
    """What every row says."""

    model: str
    command: str
    seed: int
    key: Any
    """Plain values that tell one aligned model from another."""


class Scorer:
    """Scores placements; what a folder holds already is not measured again.

    Args:
        model: converted in all layers that can be chosen, aligned, in evaluation mode.
        samples: name -> windows.
        scores: receives a row for each metric of a sample and placement.
        signature: what the rows say beside their numbers.
        autocast: dtype for torch.autocast, or None.
    """

    def __init__(
        self,
        model: Any,
        samples: Mapping[str, Sample],
        scores: Scores,
        signature: Signature,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.samples = samples
        self.scores = scores
        self.signature = signature
        self.layers = _numbers(model)
        self.student = Shortened(model, autocast)
        self.teacher = _Teacher(model, autocast)
        self.meter: Any = None
        self._about = {name: key_of(sample.ids.tolist()) for name, sample in samples.items()}
        self._folder: Path = scores.path.parent / "tokens"
        self._kl: dict[str, Tensor] = {}

    def __call__(self, kept: Kept, name: str) -> dict[str, Score]:
        """Metric -> score of the model whose layers `kept` are softmax and all others converted, on a sample."""
        key, meter = self._key(kept, name), self.meter
        done = 0 if meter is None else meter.done
        kl = self._tokens(kept, name)
        if meter is not None:  # what was measured before counts too
            meter.advance(done + self.samples[name].ids.numel() - meter.done)
        rows = self.scores.of(key)
        if not rows:
            found = [self._mean(metric, kl, name) for metric in self.samples[name].masks]
            rows = [self._signed(row, named(kept, self.layers), name, key) for row in found]
            self.scores.add(rows)
        return {row.metric: row for row in rows}

    @contextmanager
    def near(self, kept: Kept) -> Iterator[None]:
        """Inside, placements that differ from this one in few, late layers are scored in less time."""
        self.student.begin(kept)
        try:
            yield
        finally:
            self.student.end()

    def teacher_nll(self, name: str) -> Score:
        """The teacher's negative log-likelihood, nats a token, where the sample's only metric looks."""
        key = key_of(self._key(self.layers, name), TEACHER)
        rows = self.scores.of(key)
        if not rows:
            (where,) = self.samples[name].masks.values()
            nll = score_tokens(self.teacher, self.samples[name].ids).nll
            row = replace(self._interval("answer_nll", nll, where), against="")
            rows = [self._signed(row, TEACHER, name, key)]
            self.scores.add(rows)
        return rows[0]

    def difference(self, one: Kept, other: Kept, metric: str, name: str) -> Score:
        """Mean of the first's KL minus the other's, window by window: what windows share falls out of the interval."""
        return self._mean(metric, self._tokens(one, name) - self._tokens(other, name), name)

    def seconds_a_token(self) -> float:
        """Of a pass of all converted layers, beside the teacher's kept one."""
        cut = next(iter(self.samples.values())).ids[:1]
        score_tokens(self.student, cut, self.teacher)
        started = time.monotonic()
        score_tokens(self.student, cut, self.teacher)
        return (time.monotonic() - started) / cut.numel()

    def _tokens(self, kept: Kept, name: str) -> Tensor:
        """[N, T - 1] KL of every token."""
        key, cut = self._key(kept, name), self.samples[name].ids
        if key in self._kl:
            return self._kl[key]
        file = self._folder / f"{key}.safetensors"
        kl = _read(file, (len(cut), cut.shape[1] - 1))
        if kl is None:
            self.student.kept = kept
            wanted = torch.stack(list(self.samples[name].masks.values())).any(0)
            where = (
                None if bool(wanted.all()) else wanted
            )  # the head, over a vocabulary, is a third of a short pass
            found = score_tokens(self.student, cut, self.teacher, meter=self.meter, where=where)
            assert found.kl is not None
            kl = found.kl
            if set(kept) >= set(self.layers) and not bool(kl.isfinite().all()):
                raise NotFiniteError(
                    f"{self.signature.model}: its predictions are not finite, so nothing can be held against them"
                )
            self._folder.mkdir(parents=True, exist_ok=True)
            write_tensors_file(file, {"kl": kl})
        self._kl[key] = kl
        return kl

    def _mean(self, metric: str, values: Tensor, name: str) -> Score:
        return self._interval(metric, values, self.samples[name].masks[metric])

    def _interval(self, metric: str, values: Tensor, where: Tensor) -> Score:
        sums = torch.where(where, values, 0.0).double().sum(1).numpy()
        mean, low, high = bootstrap(sums, where.sum(1).numpy(), self.signature.seed)
        ends = (low, high) if math.isfinite(low) and math.isfinite(high) else (None, None)
        return score(metric, mean, ends, int(where.sum()), against=TEACHER)

    def _key(self, kept: Sequence[int], name: str) -> str:
        return key_of(
            self.signature.key, str(self.student.autocast), self._about[name], __version__, sorted(kept), name
        )

    def _signed(self, row: Score, role: str, name: str, key: str) -> Score:
        return replace(
            row,
            model=self.signature.model,
            role=role,
            suite="select",
            task=name,
            length=self.samples[name].ids.shape[1],
            seed=self.signature.seed,
            version=f"linearize {__version__}",
            command=self.signature.command,
            key=key,
        )


def named(kept: Kept, layers: Sequence[int]) -> str:
    """A placement in words."""
    converted = [layer for layer in layers if layer not in kept]
    if len(converted) == 1 and len(layers) > 2:
        return f"layer {converted[0]} converted"
    return f"softmax in {', '.join(map(str, kept))}" if kept else "all converted"


def _numbers(model: Any) -> list[int]:
    return [layer.layer_idx for layer in surgery.converted(model)]


def _read(file: Path, shape: tuple[int, int]) -> Tensor | None:
    """What an earlier call has measured, or None where it is not there or damaged."""
    if not file.is_file():
        return None
    try:
        kl = read_tensors(file)["kl"]
    except (CheckpointError, KeyError):
        return None
    return kl if tuple(kl.shape) == shape else None
