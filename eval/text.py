"""Perplexity, KL to the teacher and recall split of running text, by position: one pass over the windows for all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from linearize.errors import CheckpointError, NotFiniteError
from linearize.eval.intervals import bootstrap
from linearize.eval.measurement import Call, Setting, score
from linearize.eval.recall_split import beyond, buckets, distances, name
from linearize.eval.rows import STUDENT, TEACHER, Score
from linearize.eval.suite import Takes, Unit
from linearize.eval.token_scores import Predictor, TokenScores, score_tokens
from linearize.storing import read_tensors, write_tensors_file


class Text:
    """Settings of a unit: `windows`, how many at most, 0 for all; `text`, which of the texts, is added here."""

    reads: ClassVar = True
    compares: ClassVar = True
    takes: ClassVar = {"length": Takes(least=2), "windows": Takes(least=0, needed=False)}

    def room(self, unit: Unit) -> int:
        """Nothing follows."""
        return 0

    def units(self, unit: Unit, setting: Setting) -> Sequence[Unit]:
        """One for each text."""
        return [replace(unit, settings={**unit.settings, "text": text}) for text in setting.texts]

    def tokens(self, unit: Unit, setting: Setting) -> int:
        """All of the windows."""
        return self._cut(unit, setting).numel()

    def measure(self, model: Any, call: Call, setting: Setting, meter: Any) -> list[Score]:
        """Scores over everything, by position, and by distance to the pair's last occurrence."""
        cut = self._cut(call.unit, setting)
        teacher = None if call.entrant.role == TEACHER else setting.teacher
        found = score_tokens(Predictor(model, setting.autocast), cut, teacher, meter=meter)
        if call.entrant.role in (STUDENT, TEACHER) and not bool(found.nll.isfinite().all()):
            raise NotFiniteError(
                f"{call.entrant.name}: the log-likelihood of {int((~found.nll.isfinite()).sum()):,} of "
                f"{found.nll.numel():,} tokens is not finite. The weights are damaged, or too large for this "
                "arithmetic: take another checkpoint, or train with a lower learning rate"
            )
        kept = {"nll": found.nll}
        kept |= {} if found.kl is None or found.agrees is None else {"kl": found.kl, "agrees": found.agrees}
        folder = setting.folder / "tokens"
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors_file(folder / f"{call.key}.safetensors", kept)
        made = list(_scores(found, cut, setting.seed))
        if call.entrant.role not in (STUDENT, TEACHER):
            file = folder / f"{setting.key_of(STUDENT, call.unit)}.safetensors"
            try:
                student = read_tensors(file)["nll"]
            except (CheckpointError, KeyError):
                return made  # somebody deleted them
            made += _differences(found.nll, student, distances(cut), setting.seed)
        return made

    def _cut(self, unit: Unit, setting: Setting) -> Tensor:
        return setting.windows(unit.settings["text"], unit.length, unit.settings.get("windows"))


def _scores(found: TokenScores, cut: Tensor, seed: int) -> Iterator[Score]:
    length = cut.shape[1]
    position = torch.arange(1, length).expand_as(found.nll)
    back = distances(cut)
    everywhere = torch.ones_like(back, dtype=torch.bool)
    over = partial(_mean, seed=seed)
    yield over("ppl", found.nll, everywhere)
    yield over("ppl_hit", found.nll, back > 0)
    yield over("ppl_other", found.nll, back == 0)
    if found.kl is not None and found.agrees is not None:
        yield over("kl", found.kl, everywhere, against=TEACHER)
        yield over("agreement", found.agrees, everywhere, against=TEACHER)
    for low, high in buckets(length):
        here = partial(over, by="position", bucket=name((low, high)))
        inside = (position >= low) & (position < high)
        yield here("ppl", found.nll, inside)
        if found.kl is not None:
            yield here("kl", found.kl, inside, against=TEACHER)
        if bool((inside & (back > 0)).any()):
            yield here("ppl_hit", found.nll, inside & (back > 0))
    for bucket, far in _far(back):
        yield over("ppl_hit", found.nll, far, by="distance", bucket=bucket)


def _far(back: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Where a pair is repeated, by the distance to its last occurrence, and at any distance beyond 64 tokens."""
    length = back.shape[1] + 1
    last = beyond(length)
    for low, high in [*buckets(length), *([] if last is None else [last])]:
        far = (back >= max(low, 1)) & (back < high)
        if bool(far.any()):
            yield name((low, high)), far


def _differences(own: Tensor, student: Tensor, back: Tensor, seed: int) -> list[Score]:
    """Of a control to the student, token by token: what the windows share falls out of the interval."""
    apart = own - student
    everywhere = torch.ones_like(back, dtype=torch.bool)
    made = [_mean("nll_difference", apart, everywhere, seed=seed, against=STUDENT)]
    for bucket, far in _far(back):
        place = {"by": "distance", "bucket": bucket, "against": STUDENT}
        made.append(_mean("nll_difference", apart, far, seed=seed, **place))
    return made


def _mean(metric: str, values: Tensor, where: Tensor, *, seed: int, **place: str) -> Score:
    """Mean over tokens with its interval over windows; exp of both for a perplexity."""
    sums = torch.where(where, values, 0.0).double().sum(1).numpy()
    mean, low, high = bootstrap(sums, where.sum(1).numpy(), seed)
    if metric.startswith("ppl"):
        mean, low, high = (_exp(x) for x in (mean, low, high))
    ends = (low, high) if math.isfinite(low) and math.isfinite(high) else (None, None)
    return score(metric, mean, ends, int(where.sum()), **place)


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.nan if math.isnan(nll) else math.inf
