"""Loops are seen on the device as soon as the host's own rule sees them, and a row that loops begins anew."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from linearize.decode import Sampling
from linearize.sample.documents import documents
from linearize.sample.loops import GRAM, MOST, REPEATED, STRETCH, Watch, loops
from linearize.sample.writer import Writer


def first_loop(ids: np.ndarray) -> int | None:
    """Place of the token with which some stretch has come to repeat more than MOST groups; by plain loops."""
    groups: list[tuple[int, ...]] = []
    again: list[bool] = []
    for place in range(GRAM - 1, len(ids)):
        group = tuple(ids[place - GRAM + 1 : place + 1])
        again.append(group in groups)
        groups.append(group)
        if sum(again[-STRETCH:]) > MOST:
            return place
    return None


def drawn(seed: int) -> np.ndarray:
    """Text, with a loop somewhere or without one."""
    random = np.random.default_rng(seed)
    ids = random.integers(5, 40, size=240)
    if seed % 4:
        start, period = random.integers(0, 150), random.integers(1, 30)
        ids[start + period :] = np.resize(ids[start : start + period], 240 - start - period)
    return ids


def test_the_rule_is_the_hosts():
    assert MOST <= REPEATED * STRETCH < MOST + 1
    texts = [drawn(seed) for seed in range(24)]
    watch = Watch(len(texts), 240, torch.device("cpu"))
    rows = torch.from_numpy(np.stack(texts))
    found: list[int | None] = [None] * len(texts)
    for round_ in range(2):  # the second time over what the first has left
        if round_:
            rows, found = rows.flip(0), [None] * len(texts)
        for place in range(240):
            if place == 0 and round_ == 0:
                watch.begin(rows[:, 0])
            else:
                watch.take(rows[:, place], torch.full((len(texts),), place))
            for row in range(len(texts)):
                if found[row] is None and watch.looping[row]:
                    found[row] = place
        assert found == [first_loop(row.numpy()) for row in rows]
    assert any(place is None for place in found) and sum(place is not None for place in found) > 12
    for ids, place in zip(rows.numpy(), found, strict=True):
        assert loops(ids) == (place is not None)
        if place is not None:
            assert loops(ids[: place + 1]), "the host drops what the device has ended"


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_row_that_loops_begins_anew(temperature):
    model, openings = tiny.model(), [[5], [11, 12, 13], [30, 31]]
    sampling = Sampling(temperature > 0, temperature or 1.0, 3)
    made = Writer(model, 3, sampling, openings, ends=(), length=150, steps=500, capture=False)
    made.prepare_order(20)
    order = np.random.default_rng(0).integers(len(openings), size=(3, 20))
    found = list(documents(made.write(order, 0), order, np.array(list(map(len, openings)))))
    assert sum(len(document.ids) for document in found) == 3 * 500
    whole = [document for document in found if len(document.ids) < 150 and not document.ended]
    for document in found:
        place = first_loop(document.ids)
        assert place is None or place == len(document.ids) - 1
    if not temperature:
        assert len(whole) > 6 and sum(first_loop(document.ids) is not None for document in whole) > 6
