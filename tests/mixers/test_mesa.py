"""The mesa layer against systems that are built token by token and solved exactly, values and gradients."""

from __future__ import annotations

import pytest
import torch
from compositions import SHAPES, Draw, make
from kernel_calls import INTERPRETED
from torch.nn import functional as F

from linearize.kernels import dispatch
from linearize.mixers import build, check

SHAPE = SHAPES["grouped"]
PLAIN = {
    "feature_map": {"name": "identity"},
    "update": {"name": "mesa", "steps": 12},
    "normalizer": {"name": "none"},
}
GATED = {**PLAIN, "gate": {"name": "mamba2"}}


def loop(made, x, row, first, last):
    """Some tokens of one row, a document of their own."""
    update, shape = made.update, made.shape
    decay = None if made.recurrent.gate is None else made.recurrent.gate(x.hidden, x.k).exp()
    heads, out = update.heads, []
    for head in range(shape.heads):
        m, key_head = head // (shape.heads // heads), head // shape.group
        gram = torch.zeros(shape.key_dim, shape.key_dim, dtype=torch.float64)
        sums = torch.zeros(shape.key_dim, shape.value_dim, dtype=torch.float64)
        ridge = 0.25 + torch.log1p(torch.exp(update.ridge[m]))
        for t in range(first, last):
            key = x.k[row, t, key_head] / x.k[row, t, key_head].norm()
            weight = torch.sigmoid(x.hidden[row, t] @ update.beta_weight[:, m] + update.beta_bias[m])
            kept = 1.0 if decay is None else decay[row, t, m // (heads // decay.shape[2])]
            gram = kept * gram + weight * torch.outer(key, key)
            sums = kept * sums + weight * torch.outer(key, x.v[row, t, key_head])
            query = x.q[row, t, head] / x.q[row, t, head].norm()
            out.append(update.scale[head] * torch.linalg.solve(gram + torch.diag(ridge), query) @ sums)
    return torch.stack(out).unflatten(0, (shape.heads, last - first)).transpose(0, 1)


@pytest.mark.parametrize("mixer", [PLAIN, GATED], ids=["plain", "gated"])
def test_it_is_least_squares(mixer):
    """With as many steps as features and some; padding, documents, and every gradient."""
    made = make(mixer, SHAPE, torch.float64)
    starts, valid = torch.zeros(2, 40, dtype=torch.bool), torch.ones(2, 40, dtype=torch.bool)
    starts[0, 15], valid[1, :9] = True, False
    cuts = [(0, 0, 15), (0, 15, 40), (1, 9, 40)]
    outs, grads = [], []
    for form in ("loop", "chunked", "parallel"):
        x = Draw.of(SHAPE, 40, torch.float64).apply(lambda y: y.requires_grad_())
        if form == "loop":
            parts = [loop(made, x, *cut) for cut in cuts]
        else:
            whole = x.run(getattr(made, form), starts=starts, valid=valid)
            parts = [whole[row, first:last] for row, first, last in cuts]
        out = torch.cat(parts)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        wanted = [x.q, x.k, x.v, x.hidden, *made.parameters()]
        outs.append(out)
        grads.append(torch.autograd.grad((out * weight).sum(), wanted))
    for out, found in zip(outs[1:], grads[1:], strict=True):
        torch.testing.assert_close(out, outs[0], atol=1e-9, rtol=1e-7)
        for one, two in zip(found, grads[0], strict=True):
            torch.testing.assert_close(one, two, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(
    "mixer", [pytest.param(PLAIN, id="plain", marks=INTERPRETED), pytest.param(GATED, id="gated")]
)
def test_kernels_give_what_the_parts_do(mixer):
    """Outputs, both matrices that are carried, and gradients, in Triton's interpreter where there is no GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mixer = {**mixer, "update": {"name": "mesa", "steps": 3}}
    found = {}
    for kind in ("torch", "triton"):
        made = make(mixer, SHAPE, torch.float32).to(device)
        x = Draw.of(SHAPE, 40, torch.float32, batch=1).apply(lambda y: y.to(device))
        starts = torch.zeros(1, 40, dtype=torch.bool, device=device)
        starts[0, 23] = True
        with dispatch.kernels(kind):
            out = x.run(made.chunked, starts=starts)
            grads = torch.autograd.grad(out.square().sum(), list(made.parameters()))
            state = made.initial_state(1, torch.float32, torch.device(device))
            with torch.no_grad():
                x.run(made.chunked, starts=starts, state=state)
                step = Draw.of(SHAPE, 1, torch.float32, batch=1, seed=3).apply(lambda y: y.to(device))
                after = step.run(made.step, state=state)
        found[kind] = [out, after, state["gram"], state["sums"], *grads]
    for one, two in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-4 * max(1.0, two.abs().max().item()), rtol=0)


def test_it_starts_as_ridge_regression_of_one():
    made = build({**PLAIN, "update": {"name": "mesa", "ridge": 1.0}}, SHAPE)
    torch.testing.assert_close(0.25 + F.softplus(made.update.ridge), torch.ones_like(made.update.ridge))


def test_a_decay_per_feature_is_refused():
    (problem,) = check({**PLAIN, "gate": {"name": "kda", "rank": 3}})
    assert problem.startswith("mixer.gate: update 'mesa' takes no gate or a gate per head")
