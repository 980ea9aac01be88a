"""States of stretches: what is carried, and heads that hold nothing."""

from __future__ import annotations

import pytest
import torch

from linearize.kernels import dispatch
from linearize.kernels.gated_delta import delta_step
from linearize.kernels.gated_linear import gated_linear_step
from linearize.kernels.stretches import carry, carry_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(2, 3, 16, 8), (1, 1, 5), (3, 70, 33), (2, 0, 4)]


def states(size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(size[0], 5, *size[1:], generator=generator, dtype=dtype)


def test_it_counts():
    """What is below the target is there, and nowhere else; other rows are as they were."""
    before = states((4, 3), torch.float64)
    after = before.clone()
    carry(after, torch.tensor([0, 1, 3, 4]))
    wanted = before.clone()
    for row, target in ((1, 1), (2, 3), (3, 4)):
        wanted[row, target] = before[row, : target + 1].sum(0)
        wanted[row, :target] = 0
    torch.testing.assert_close(after, wanted)


@pytest.mark.parametrize("size", SIZES)
def test_in_triton(size, poisoned_memory):
    before = states(size)
    target = torch.arange(size[0]) * 2 % 5
    wanted, got = before.clone(), before.to(DEVICE)
    carry_reference(wanted, target)
    with dispatch.kernels("triton"):
        carry(got, target.to(DEVICE))
    torch.testing.assert_close(got.cpu(), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rule", ["delta", "linear"])
@pytest.mark.parametrize("decays", ["none", "head", "feature"])
def test_heads_that_hold_nothing_are_left_alone(rule, decays, poisoned_memory):
    """In Triton not even what lies in their memory is read; elsewhere they answer zero all the same."""
    generator = torch.Generator().manual_seed(3)

    def draw(*size):
        return torch.randn(*size, generator=generator).to(DEVICE)

    batch, held, heads, width, values = 2, 6, 12, 16, 24
    live = (torch.arange(batch * held).view(batch, held) % 3 != 1).to(DEVICE)
    q, k, v = draw(batch, heads, width), draw(batch, held, width), draw(batch, held, values)
    k = torch.nn.functional.normalize(k, dim=-1)
    beta, state, norms = (
        draw(batch, held).sigmoid(),
        draw(batch, held, width, values),
        draw(batch, held, width),
    )
    shapes = {"none": None, "head": (batch, held), "feature": (batch, held, width)}[decays]
    decay = None if shapes is None else -draw(*shapes).abs()
    (v if rule == "delta" else k)[~live] = 0
    found = {}
    for kind in ("torch", "triton"):
        sums, total = state.clone(), norms.clone()
        sums[~live] = total[~live] = 0 if kind == "torch" else float("nan")
        with dispatch.kernels(kind):
            if rule == "delta":
                made = [delta_step(q, k, v, beta, decay, sums, live)]
            else:
                made = list(gated_linear_step(q, k, v, decay, sums, total, live=live))
        readers = (~live).repeat_interleave(heads // held, 1)
        assert all(not x[readers].any() for x in made)
        found[kind] = [*made, sums[live], total[live]]
        if kind == "triton":
            assert sums[~live].isnan().all()
    for one, two in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=2e-5)
