"""The delta rule without what conversions add to it: no bias on beta, 1 / sqrt(K) in the place of a learned scale."""

from __future__ import annotations

import math

import pytest
import torch
from compositions import SHAPES, Draw, make

SHAPE = SHAPES["grouped"]
MIXER = {
    "feature_map": {"name": "identity", "l2_normalize": True},
    "update": {"name": "delta", "bias": False, "rescales": False},
    "normalizer": {"name": "none"},
}


@pytest.mark.parametrize("gate", [None, {"name": "mamba2"}])
def test_it_is_its_equation(gate):
    made = make({**MIXER, **({"gate": gate} if gate else {})}, SHAPE, torch.float64)
    x = Draw.of(SHAPE, 40, torch.float64)
    assert made.update.beta_bias is None and made.update.scale is None
    out = x.run(made.chunked)
    heads = made.update.heads
    for row in range(2):
        beta = (x.hidden[row] @ made.update.beta_weight).sigmoid()
        decay = torch.ones(40, heads, dtype=torch.float64)
        if gate:
            decay = made.recurrent.gate(x.hidden, x.k)[row].exp()
        for head in range(SHAPE.heads):
            group, own = head // SHAPE.group, head * heads // SHAPE.heads
            state = torch.zeros(SHAPE.key_dim, SHAPE.value_dim, dtype=torch.float64)
            for t in range(40):
                q, k, v = x.q[row, t, head], x.k[row, t, group], x.v[row, t, group]
                q, k = q / q.norm(), k / k.norm()
                state = decay[t, own] * state
                state = state + beta[t, own] * torch.outer(k, v - k @ state)
                expected = q @ state / math.sqrt(SHAPE.key_dim)
                torch.testing.assert_close(out[row, t, head], expected, atol=1e-10, rtol=1e-8)


def test_nothing_of_it_is_left_to_calibrate():
    made = make(MIXER, SHAPE, torch.float32)
    before = {name: value.clone() for name, value in made.update.state_dict().items()}
    assert not made.update.resize(torch.full((SHAPE.heads,), 2.0))
    made.reset_parameters()
    assert set(before) == {"beta_weight"} and not made.update.beta_weight.any()
