"""When two runs of a stage count as one: `short_stages.alike`."""

from __future__ import annotations

import pytest
import torch
from short_stages import alike, trained, trembling


def test_what_noise_does_not_do_is_heard():
    begun = {"steady": torch.zeros(4), "shaky": torch.zeros(4)}
    way = torch.tensor([1.0, 1.0, 1.0, 1.0])

    def run(steady: float, shaky: float):
        return [1.0], {"steady": way + steady, "shaky": way + shaky}, None

    def disturbed():
        return run(0.001, 0.5)

    alike(run(0, 0), run(0.05, 0.05), begun)
    alike(run(0, 0), run(0.05, 0.4), begun, disturbed)
    for other in (run(0.05, 0.6), run(0.2, 0.05)):
        with pytest.raises(AssertionError, match=r"shaky|steady"):
            alike(run(0, 0), other, begun, disturbed)
    with pytest.raises(AssertionError, match=r"shaky"):
        alike(run(0, 0), run(0.05, 0.4), begun)


def test_noise_is_the_same_each_time(tmp_path):
    found = [
        trained(tmp_path / name, "lolcats", "transfer", 2, capture=False, device="cpu", watches=watches)
        for name, watches in (("a", trembling), ("b", trembling), ("c", lambda trainer: None))
    ]
    names = list(found[0][1])
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in names)
    assert not all(torch.equal(found[0][1][name], found[2][1][name]) for name in names)
