"""What a model writes: decoding against prefill on real text, and greedy continuations with their plainest faults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from linearize.eval.dictation import dictated
from linearize.eval.intervals import bootstrap, wilson
from linearize.eval.measurement import Call, Setting, score
from linearize.eval.recall.answering import Cached
from linearize.eval.rows import Score
from linearize.eval.suite import Takes, Unit
from linearize.eval.token_scores import Predictor
from linearize.storing import write_json

SAMPLES = "samples"
"""Folder of the written texts."""


class Decoding:
    """Step by step over `length` tokens of real text: does the state that it carries predict what prefill does?"""

    reads: ClassVar = True
    compares: ClassVar = False
    takes: ClassVar = {"length": Takes(least=2)}

    def room(self, unit: Unit) -> int:
        """Nothing follows."""
        return 0

    def units(self, unit: Unit, setting: Setting) -> Sequence[Unit]:
        """On the first text."""
        return [replace(unit, settings={**unit.settings, "text": next(iter(setting.texts))})]

    def tokens(self, unit: Unit, setting: Setting) -> int:
        """A prefill, and a step for each token."""
        return int(_text(unit, setting, unit.length, 1).numel()) * (1 + setting.step)

    def measure(self, model: Any, call: Call, setting: Setting, meter: Any) -> list[Score]:
        """Share of tokens with the same most likely follower, and the largest difference of a log-probability."""
        [ids] = _text(call.unit, setting, call.unit.length, 1)
        # without autocast: rounding to bfloat16 would hide what is looked for
        prefill = Predictor(model).window(ids)
        meter.advance(len(ids))
        start, same, apart = 0, 0, 0.0
        for steps in dictated(model, ids, prefill(slice(0, 1)).shape[-1]):
            whole = prefill(slice(start, start + len(steps)))
            same += int((steps.argmax(-1) == whole.argmax(-1)).sum())
            apart = max(apart, float((steps.log_softmax(-1) - whole).abs().max()))
            meter.advance(setting.step * len(steps))
            start += len(steps)
        n = len(ids)
        return [
            score("decode_agreement", same / n, wilson(same, n), n),
            score("decode_difference", apart, n=n),
        ]


class Writing:
    """Greedy continuations. Settings: `items` beginnings of `length` tokens, `new_tokens` behind each."""

    reads: ClassVar = True
    compares: ClassVar = False
    takes: ClassVar = {"length": Takes(), "items": Takes(), "new_tokens": Takes()}

    def room(self, unit: Unit) -> int:
        """What is written."""
        return int(unit.settings["new_tokens"])

    def units(self, unit: Unit, setting: Setting) -> Sequence[Unit]:
        """On the first text."""
        return [replace(unit, settings={**unit.settings, "text": next(iter(setting.texts))})]

    def tokens(self, unit: Unit, setting: Setting) -> int:
        """Prompts, and the steps of the batch."""
        return (
            int(_text(unit, setting, unit.length, unit.settings["items"]).numel())
            + setting.step * unit.settings["new_tokens"]
        )

    def measure(self, model: Any, call: Call, setting: Setting, meter: Any) -> list[Score]:
        """Repetition, distinct n-grams and length; the texts go into the setting's folder."""
        prompts = _text(call.unit, setting, call.unit.length, call.unit.settings["items"])
        cached, step = Cached(model, setting.autocast), setting.step
        with cached.together():
            made = [cached(prompts).argmax(-1)]
            meter.advance(prompts.numel())
            for _ in range(call.unit.settings["new_tokens"] - 1):
                made.append(cached(made[-1][:, None]).argmax(-1))
                meter.advance(step)
        end = setting.tokenizer.eos_token_id
        rows = [_until(row, end) for row in torch.stack(made, 1).tolist()]
        folder = setting.folder / SAMPLES
        folder.mkdir(parents=True, exist_ok=True)
        written = {
            "model": call.entrant.name,
            "role": call.entrant.role,
            "prompts": setting.tokenizer.batch_decode(prompts),
            "texts": setting.tokenizer.batch_decode(rows),
        }
        write_json(folder / f"{call.key}.json", written)
        return list(_faults(rows, setting.seed))


def _faults(rows: Sequence[Sequence[int]], seed: int) -> list[Score]:
    shares = {
        "repetition": [1 - distinct(row, 4) if len(row) >= 4 else 0.0 for row in rows],
        "distinct_1": [distinct(row, 1) for row in rows],
        "distinct_2": [distinct(row, 2) for row in rows],
        "generated": [float(len(row)) for row in rows],
    }
    made = []
    for metric, values in shares.items():
        mean, low, high = bootstrap(values, np.ones(len(values)), seed)
        made.append(score(metric, mean, (low, high) if len(values) > 1 else (None, None), len(values)))
    return made


def distinct(tokens: Sequence[int], size: int) -> float:
    """Different n-grams of a size as a share of all (Li et al. 2016, arXiv 1510.03055); 1 where there is none."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def _until(row: list[int], end: int | None) -> list[int]:
    return row[: row.index(end)] if end in row else row


def _text(unit: Unit, setting: Setting, length: int, count: int) -> Tensor:
    """So many windows [count, length]."""
    return setting.windows(unit.settings["text"], length, count)
