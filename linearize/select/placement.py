"""Placements of the layers that stay softmax: chosen greedily, by single scores, evenly, and at random."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

Kept = tuple[int, ...]
"""Numbers of the layers that stay softmax, ascending."""


@dataclass(frozen=True)
class Restored:
    """One step of `greedy`."""

    layer: int
    """That becomes softmax again."""
    kept: Kept
    """All that are softmax after it."""
    scores: Mapping[int, float]
    """What every candidate of the step would have scored; lower is better."""


def greedy(
    layers: Sequence[int],
    keep: int,
    score: Callable[[Kept], float],
    near: Callable[[Kept], AbstractContextManager[object]] = nullcontext,
) -> list[Restored]:
    """From all converted, restore the layer whose restoring scores lowest, `keep` times.

    KL-guided selection (Li et al. 2025, arXiv 2512.20569) restores one layer at a time as well, but scores each once.

    Args:
        layers: numbers of the layers that may be restored.
        keep: how many are.
        score: of a placement; lower is better. Of equal ones, and among scores that are NaN, the first layer wins.
        near: a context in which a step's placements, each one layer away from the given one, are scored.
    """
    steps: list[Restored] = []
    kept: Kept = ()
    for _ in range(keep):
        with near(kept):
            found = {layer: score(with_layer(kept, layer)) for layer in layers if layer not in kept}
        (best,) = best_first(found, 1)
        kept = with_layer(kept, best)
        steps.append(Restored(best, kept, found))
    return steps


def with_layer(kept: Kept, layer: int) -> Kept:
    """A placement with one layer more."""
    return tuple(sorted((*kept, layer)))


def worst_first(alone: Mapping[int, float], keep: int) -> Kept:
    """The layers that cost most when they alone are converted (as HALO ranks them, arXiv 2601.22156)."""
    ranked = sorted(alone, key=lambda layer: (alone[layer] == alone[layer], -alone[layer], layer))
    return tuple(sorted(ranked[:keep]))


def best_first(restored: Mapping[int, float], keep: int) -> Kept:
    """The layers after whose restoring alone the least is lost (KL-guided selection, arXiv 2512.20569)."""
    ranked = sorted(restored, key=lambda layer: (restored[layer] != restored[layer], restored[layer], layer))
    return tuple(sorted(ranked[:keep]))


def uniform(layers: Sequence[int], keep: int) -> Kept:
    """As even as can be, ending with the last layer; what ``{every: n}`` gives where n divides."""
    return tuple(layers[(place + 1) * len(layers) // keep - 1] for place in range(keep))


def at_random(layers: Sequence[int], keep: int, seed: int) -> Kept:
    """The first `keep` layers of a shuffled order, so that more kept ones hold the fewer."""
    order = list(layers)
    random.Random(seed).shuffle(order)
    return tuple(sorted(order[:keep]))


def greedy_passes(layers: int, keep: int) -> int:
    """How many placements `greedy` asks for."""
    return sum(layers - step for step in range(keep))
