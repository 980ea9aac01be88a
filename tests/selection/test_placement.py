"""Placements against hand-made examples: greedy, ranked, even and random ones."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from linearize.select.placement import at_random, best_first, greedy, greedy_passes, uniform, worst_first
from linearize.surgery import select

ALONE = {0: 5.0, 1: 4.0, 2: 3.0, 3: 0.5}


def together(kept: tuple[int, ...]) -> float:
    """Layers 0 and 1 stand in for each other: once one is softmax, the other is worth nothing."""
    if 0 in kept or 1 in kept:
        kept = (*kept, 0, 1)
    return sum(cost for layer, cost in ALONE.items() if layer not in kept)


def test_greedy_sees_what_single_scores_do_not():
    steps = greedy(range(4), 2, together)
    assert [step.layer for step in steps] == [0, 2] and steps[-1].kept == (0, 2)
    assert worst_first(ALONE, 2) == (0, 1) and together((0, 1)) > together((0, 2))
    assert best_first(steps[0].scores, 2) == (0, 1)
    assert steps[0].scores == {0: 3.5, 1: 3.5, 2: 9.5, 3: 12.0} and set(steps[1].scores) == {1, 2, 3}


def test_ties_and_nan_go_to_the_first_layer():
    assert [step.layer for step in greedy([3, 5, 8], 2, lambda kept: 1.0)] == [3, 5]
    assert greedy([3, 5, 8], 1, lambda kept: 1.0 if 8 in kept else math.nan)[0].layer == 8
    assert worst_first({3: 1.0, 5: math.nan, 8: 2.0}, 1) == (5,)  # a layer that breaks the model comes first
    assert best_first({3: 2.0, 5: math.nan, 8: 1.0}, 2) == (3, 8)


@pytest.mark.parametrize(("layers", "every"), [(12, 4), (30, 5), (8, 2)])
def test_uniform_is_every_nth_where_that_divides(layers, every):
    numbers = list(range(layers))
    converted = select({"every": every}, numbers)
    assert uniform(numbers, layers // every) == tuple(n for n in numbers if n not in converted)


def test_uniform_spreads_any_number():
    assert uniform(range(30), 7) == (3, 7, 11, 16, 20, 24, 29)
    assert all(len(set(uniform(range(30), keep))) == keep for keep in range(1, 30))


def test_random_placements_grow_and_repeat():
    layers = range(20)
    for seed in range(3):
        placed = [set(at_random(layers, keep, seed)) for keep in range(1, 20)]
        assert all(few < more for few, more in pairwise(placed))
        assert at_random(layers, 5, seed) == at_random(layers, 5, seed)
    assert len({at_random(layers, 5, seed) for seed in range(3)}) == 3


def test_passes_are_counted():
    scored: list[tuple[int, ...]] = []
    greedy(range(9), 3, lambda kept: scored.append(kept) or 0.0)
    assert greedy_passes(9, 3) == len(scored) == 24
