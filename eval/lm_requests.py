"""What lm-eval will ask of a model: how many tokens in all, before it begins, and how far it has come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

SAMPLE = 12
"""Items of a task that are looked at; of a group's, as many in each, or fewer where it has many tasks."""
WRITTEN = 256
"""Tokens that an answer may take where the task does not say."""


class Share:
    """Part of a bar, given out as far as what lm-eval asks for is done: more than the part it never is.

    Args:
        meter: object with `advance(units)`.
        units: of the bar, in all.
    """

    def __init__(self, meter: Any, units: int) -> None:
        self.meter = meter
        self.units = units
        self._given = self._asked = self._done = 0

    @contextmanager
    def of(self, asked: int) -> Iterator[None]:
        """While so much, in units of any kind, is asked for; inside of it what else is asked for is a part of it."""
        outer = self._asked == 0
        if outer:
            self._asked, self._done = max(1, asked), 0
        yield
        if outer:
            self.advance(self._asked)
            self._asked = 0

    def advance(self, done: int) -> None:
        """So much of what is asked for is done, padding included."""
        self._done = min(self._asked, self._done + done)
        due = self.units * self._done // max(1, self._asked)
        if due > self._given:
            self.meter.advance(due - self._given)
            self._given = due


def distinct(requests: Sequence[Any]) -> set[tuple[int, ...]]:
    """What a model reads for requests (text, context, answer): those that differ in their last token alone are one.

    Args:
        requests: of `HFLM._loglikelihood_tokens`.
    """
    return {tuple([*context, *answer][:-1]) for _, context, answer in requests}


def expected(tasks: Mapping[str, Any], encode: Any, *, limit: int, most: int, rows: int, step: int) -> int:
    """Tokens that go through a model, from all items' number and the requests of some of them.

    Args:
        tasks: name -> loaded task of lm-eval, whose requests are built anew.
        encode: `Tokens` of the model's tokenizer.
        limit: items of each task; 0 takes all.
        most: tokens that the model holds.
        rows: sequences that decode together.
        step: what a step of decoding counts for.
    """
    total = 0.0
    sample = max(2, SAMPLE // max(1, len(tasks) // 8))
    for task in tasks.values():
        items = len(task.eval_docs)
        items = min(items, limit) if limit else items
        task.build_all_requests(limit=min(sample, items))
        read, written, last = 0, 0, set()
        for request in task.instances:
            text, *others = request.args
            ids = tuple(encode([text])[0])
            if request.request_type == "loglikelihood":
                ids += tuple(encode([others[0]])[0])[:-1]
            if ids not in last:
                last.add(ids)
                read += min(len(ids) + len(encode.begin), most)
            if request.request_type == "generate_until":
                written += int(others[0].get("max_gen_toks", WRITTEN))
        total += items * (read + written * step / rows) / min(sample, items)
    return int(total)
