"""Right or wrong: the scores of an answer, and of many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from linearize.eval.intervals import bootstrap, wilson
from linearize.eval.measurement import score
from linearize.eval.recall.answering import Answer
from linearize.eval.recall.item import Item
from linearize.eval.rows import Score


def exact(item: Item, text: str) -> bool:
    """Whether the continuation begins with the answer, but for spaces and a colon, and the answer ends there."""
    found = text.lstrip(" \n\t:")
    return found.startswith(item.answers[0]) and not found[len(item.answers[0]) :][:1].isalnum()


def recalled(item: Item, text: str) -> float:
    """Share of the answers that stand in the continuation, in any order and case (RULER's string_match_all)."""
    return sum(answer.lower() in text.lower() for answer in item.answers) / len(item.answers)


def choice(answer: Answer) -> bool:
    """Whether the right answer is likelier than every distractor."""
    return answer.log_probs[0] > max(answer.log_probs[1:])


def scores(items: Sequence[Item], found: Sequence[Answer], seed: int) -> Iterator[Score]:
    """Over all items; for a task with one needle also by its depth."""
    yield from _all(items, found, seed, "", "")
    depths = [item.depth for item in items]
    grid = sorted({depth for depth in depths if depth is not None})
    if len(grid) < len(items) and len(grid) > 1:
        for depth in grid:
            here = [index for index, at in enumerate(depths) if at == depth]
            yield from _all([items[i] for i in here], [found[i] for i in here], seed, "depth", f"{depth:.2f}")


def _all(items: Sequence[Item], found: Sequence[Answer], seed: int, by: str, bucket: str) -> Iterator[Score]:
    n = len(items)
    if all(len(item.answers) == 1 for item in items):
        right = sum(exact(item, answer.text) for item, answer in zip(items, found, strict=True))
        yield score("exact", right / n, wilson(right, n), n, by=by, bucket=bucket)
    shares = [recalled(item, answer.text) for item, answer in zip(items, found, strict=True)]
    yield score("recalled", sum(shares) / n, wilson(sum(shares), n), n, by=by, bucket=bucket)
    chosen = sum(choice(answer) for answer in found)
    yield score("choice", chosen / n, wilson(chosen, n), n, by=by, bucket=bucket)
    nll, low, high = bootstrap(
        np.array([-answer.log_probs[0] for answer in found]),
        np.array([answer.tokens[0] for answer in found]),
        seed,
    )
    ends = (low, high) if n > 1 else (None, None)
    yield score("answer_nll", nll, ends, sum(answer.tokens[0] for answer in found), by=by, bucket=bucket)
