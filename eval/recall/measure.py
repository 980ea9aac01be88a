"""Recall tasks as measurements of a suite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from random import Random
from typing import Any, ClassVar

import numpy as np
import torch

from linearize.errors import DataError
from linearize.eval.intervals import bootstrap, wilson
from linearize.eval.measurement import Call, Setting, score
from linearize.eval.recall import mqar
from linearize.eval.recall.answering import answers
from linearize.eval.recall.facts import Facts
from linearize.eval.recall.haystack import Haystack, Prompt
from linearize.eval.recall.item import Generator
from linearize.eval.recall.niah import NIAH
from linearize.eval.recall.passkey import passkey
from linearize.eval.recall.phonebook import phonebook
from linearize.eval.recall.scoring import scores
from linearize.eval.recall.variables import variable_tracking
from linearize.eval.recall_split import buckets, name
from linearize.eval.rows import Score
from linearize.eval.suite import Takes, Unit
from linearize.eval.token_scores import Predictor

GENERATORS: dict[str, Generator] = {
    "passkey": passkey,
    **NIAH,
    "variable_tracking": variable_tracking,
    "babilong_qa1": Facts(1),
    "babilong_qa2": Facts(2),
    "babilong_qa3": Facts(3),
    "phonebook": phonebook,
}
ITEMS = 20
"""Where a suite does not say how many."""
REVISIONS = {
    "phonebook": 1,
    "variable_tracking": 1,
    **dict.fromkeys(NIAH, 1),
    "niah_multikey_2": 2,
    "niah_multikey_3": 2,
}
"""Of how a task's items are made: one more since nothing cut stands behind a needle, and since RULER's depths."""
ROOM = 128
"""Tokens that an answer may take; none is as long."""


class Retrieval:
    """Prompts with needles. Settings: `items`; `depths`, a number of even depths, or absent for drawn ones.

    Args:
        task: of `GENERATORS`.
    """

    reads: ClassVar = False
    compares: ClassVar = False
    takes: ClassVar = {
        "length": Takes(),
        "items": Takes(needed=False),
        "depths": Takes(needed=False),
    }

    def __init__(self, task: str) -> None:
        self.task = task
        # scores of items that are made otherwise now are other scores, and are measured again
        self.revision = REVISIONS.get(task, 0)

    def room(self, unit: Unit) -> int:
        """Of an answer."""
        return ROOM

    def units(self, unit: Unit, setting: Setting) -> Sequence[Unit]:
        """The unit itself."""
        self._prompts(unit, setting)
        return [unit]

    def tokens(self, unit: Unit, setting: Setting) -> int:
        """Of the prompts, and what decoding costs in such tokens."""
        prompts = self._prompts(unit, setting)
        batches = -(-len(prompts) // _batch(unit, setting))
        return len(prompts) * unit.length + batches * setting.step * (
            _new_tokens(prompts) + len(prompts[0].answers)
        )

    def measure(self, model: Any, call: Call, setting: Setting, meter: Any) -> list[Score]:
        """Generated and by likelihood; with even depths also by depth."""
        prompts = self._prompts(call.unit, setting)
        found = []
        size, new_tokens = _batch(call.unit, setting), _new_tokens(prompts)
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            found += answers(model, setting.tokenizer, batch, new_tokens, setting.autocast)
            meter.advance(len(batch) * call.unit.length)
        return list(scores([prompt.item for prompt in prompts], found, setting.seed))

    def _prompts(self, unit: Unit, setting: Setting) -> tuple[Prompt, ...]:
        settings = unit.settings
        tokenizer = _Same(setting.tokenizer)
        return _made(
            self.task, tokenizer, unit.length, settings.get("items", ITEMS), settings.get("depths"),
            setting.seed,
        )  # fmt: skip


class Mqar:
    """Zoology's task on the tokenizer's own words. Settings: `items`, and `pairs` or tokens `per_pair` (16)."""

    reads: ClassVar = False
    compares: ClassVar = False
    takes: ClassVar = {
        "length": Takes(),
        "items": Takes(needed=False),
        "pairs": Takes(needed=False),
        "per_pair": Takes(needed=False),
    }

    def room(self, unit: Unit) -> int:
        """Nothing follows."""
        return 0

    def units(self, unit: Unit, setting: Setting) -> Sequence[Unit]:
        """The unit itself."""
        self._examples(unit, setting)
        return [unit]

    def tokens(self, unit: Unit, setting: Setting) -> int:
        """All of the examples."""
        return int(self._examples(unit, setting)[0].numel())

    def measure(self, model: Any, call: Call, setting: Setting, meter: Any) -> list[Score]:
        """At the queries: the likeliest token of all (exact), the likeliest value of the context (choice), the NLL."""
        inputs, labels, distances = self._examples(call.unit, setting)
        predictor = Predictor(model, setting.autocast)
        exact, choice, nll = (torch.zeros(labels.shape) for _ in range(3))
        asked = labels != mqar.UNLABELLED
        for row, ids in enumerate(inputs):
            read = predictor.window(ids)
            places = asked[row].nonzero()[:, 0]
            predicted = torch.cat([read(slice(place, place + 1)) for place in places.tolist()]).cpu()
            want = labels[row, places]
            held = predicted[:, want]  # the values of the context are those that are asked for
            exact[row, places] = (predicted.argmax(-1) == want).float()
            choice[row, places] = (held.argmax(-1) == torch.arange(len(want))).float()
            nll[row, places] = -predicted.gather(1, want[:, None])[:, 0].float()
            meter.advance(len(ids))
        made = partial(_queries, seed=setting.seed)
        rows = [*made(exact, choice, nll, asked)]
        for low, high in buckets(call.unit.length):
            far = asked & (distances >= low) & (distances < high)
            if bool(far.any()):
                rows += made(exact, choice, nll, far, by="distance", bucket=name((low, high)))
        return rows

    def _examples(self, unit: Unit, setting: Setting) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs, labels and distances [N, L] in the tokenizer's ids."""
        ids = mqar.symbols(setting.tokenizer)
        pairs = unit.settings.get("pairs", unit.length // unit.settings.get("per_pair", 16))
        made = mqar.mqar(
            setting.seed, unit.settings.get("items", ITEMS), unit.length, pairs, vocabulary=len(ids)
        )
        asked = made.labels != mqar.UNLABELLED
        labels = np.where(asked, ids[np.where(asked, made.labels, 0)], mqar.UNLABELLED)
        return torch.from_numpy(ids[made.inputs]), torch.from_numpy(labels), torch.from_numpy(made.distances)


def _queries(
    exact: torch.Tensor,
    choice: torch.Tensor,
    nll: torch.Tensor,
    where: torch.Tensor,
    *,
    seed: int,
    **place: str,
) -> Iterator[Score]:
    """Means over queries; the intervals draw whole examples."""
    counts = where.sum(1).numpy()
    for metric, values in (("exact", exact), ("choice", choice), ("answer_nll", nll)):
        mean, low, high = bootstrap(torch.where(where, values, 0.0).double().sum(1).numpy(), counts, seed)
        if metric != "answer_nll":  # at 0 and 1 all draws agree, which proves nothing
            wide = wilson(mean * int((counts > 0).sum()), int((counts > 0).sum()))
            low, high = wide if low == high else (max(low, 0.0), min(high, 1.0))
        yield score(metric, mean, (low, high), int(counts.sum()), **place)


class _Same:
    """A tokenizer as a key of a cache: the object itself."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __hash__(self) -> int:
        return id(self.tokenizer)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.tokenizer is self.tokenizer


@cache
def _haystack(tokenizer: _Same) -> Haystack:
    return Haystack(tokenizer.tokenizer)


@cache
def _made(
    task: str, tokenizer: _Same, length: int, items: int, depths: int | None, seed: int
) -> tuple[Prompt, ...]:
    """The prompts of a unit: item by item the same numbers, whatever else is measured."""
    places = [None] if depths is None else [step / max(1, depths - 1) for step in range(depths)]
    made = []
    for number in range(items):
        drawn = Random(f"{seed} {task} {length} {number}")
        item = GENERATORS[task](drawn, places[number % len(places)])
        try:
            made.append(_haystack(tokenizer).assemble(item, length, drawn))
        except DataError as error:
            raise DataError(f"{task}: {error}") from error
    return tuple(made)


def _batch(unit: Unit, setting: Setting) -> int:
    """Prompts at once."""
    return max(1, setting.batch_tokens // unit.length)


def _new_tokens(prompts: Sequence[Prompt]) -> int:
    """Enough for the longest answer, with room for what a model writes around several."""
    several = any(len(prompt.item.answers) > 1 for prompt in prompts)
    longest = max(len(prompt.answers[0]) for prompt in prompts)
    return 2 * longest if several else longest + 2
