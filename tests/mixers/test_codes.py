"""Keys as codes: softmax attention over rounded keys, exact where keys are codes, and codes from the teacher's keys."""

from __future__ import annotations

import pytest
import torch
from compositions import SHAPES, Draw, make

from linearize.kernels import dispatch
from linearize.mixers import build, fits
from linearize.mixers.statistics import Statistics

SHAPE = SHAPES["grouped"]
ONE_SCALE = {
    "name": "shared_normalizer", "window_weight_init": 0.5, "complement": True, "stabilized": True,
}  # fmt: skip
ALONE = {"feature_map": {"name": "codes", "dim": 8}}
BESIDE = {**ALONE, "window": {"name": "terraced", "size": 8}, "combine": ONE_SCALE}


def rounded(made, k):
    """Each key as its nearest code, by all distances."""
    codes = made.feature_map.codes
    return torch.stack(
        [codes[n][torch.cdist(k[:, :, n].flatten(0, 1), codes[n]).argmin(1)].view_as(k[:, :, n]) for n in range(2)],
        2,
    )  # fmt: skip


def softmax(q, k, v, scaling, seen):
    k, v = (y.repeat_interleave(2, 2) for y in (k, v))
    scores = (scaling * torch.einsum("bthk,bshk->bhts", q, k)).masked_fill(~seen, -torch.inf)
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v)


def test_it_is_softmax_over_rounded_keys():
    made, x = make(ALONE, SHAPE, torch.float64), Draw.of(SHAPE, 50, torch.float64)
    causal = torch.ones(50, 50, dtype=torch.bool).tril()
    expected = softmax(x.q, rounded(made, x.k), x.v, SHAPE.scaling, causal)
    torch.testing.assert_close(x.run(made.chunked), expected, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("form", ["parallel", "chunked"])
def test_beside_a_window_it_is_softmax_where_keys_are_codes(form):
    made, x = make(BESIDE, SHAPE, torch.float64), Draw.of(SHAPE, 60, torch.float64)
    with torch.no_grad():
        made.combine.window_factor.zero_()
    x.k = rounded(made, x.k)
    causal = torch.ones(60, 60, dtype=torch.bool).tril()
    expected = softmax(x.q, x.k, x.v, SHAPE.scaling, causal)
    torch.testing.assert_close(x.run(getattr(made, form)), expected, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("form", ["parallel", "chunked", "step"])
@pytest.mark.parametrize("first", [0, 3])
def test_keys_behind_the_window_are_rounded_and_no_others(first, form):
    """A loop over keys: those of the own block, the one before and the first ones as they are, older ones as codes."""
    made = make({**BESIDE, "window": {**BESIDE["window"], "first": first}}, SHAPE, torch.float64)
    x, size = Draw.of(SHAPE, 40, torch.float64), BESIDE["window"]["size"]
    near_codes = rounded(made, x.k)
    with torch.no_grad():
        made.combine.window_factor.zero_()
        if form == "step":
            state = made.initial_state(2, torch.float64, x.q.device)
            out = torch.cat([x[t : t + 1].run(made.step, state=state) for t in range(40)], 1)
        else:
            out = x.run(getattr(made, form))
    for row, head, t in ((0, 0, 3), (0, 3, 16), (1, 1, 24), (1, 2, 39)):
        n, total, value = head // SHAPE.group, 0.0, 0.0
        for s in range(t + 1):
            seen = s < first or s // size >= t // size - 1
            weight = (SHAPE.scaling * x.q[row, t, head] @ (x.k if seen else near_codes)[row, s, n]).exp()
            total, value = total + weight, value + weight * x.v[row, s, n]
        torch.testing.assert_close(out[row, t, head], value / total, atol=1e-9, rtol=1e-8)


def test_codes_start_at_the_centers_of_the_keys():
    made = build(ALONE, SHAPE).double()
    centers = 5 * torch.eye(8, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    noise = 0.01 * torch.randn(160, 2, 8, generator=generator, dtype=torch.float64)
    keys = centers[torch.arange(160) % 8][:, None] + noise
    opens = torch.arange(160) % 40 == 0  # a document begins with the first center
    (start,) = made.feature_map.starts(Statistics(SHAPE, keys, keys, opens, lambda: None))
    for head in range(2):
        apart = torch.cdist(keys[:, head], start["codes"][head])
        # two of eight clusters may end as one, and its keys then lie half way
        assert apart.min(1).values.square().mean() < 0.25 * keys[:, head].var(0).sum()
        nearest = apart.argmin(1)
        for code in nearest.unique().tolist()[1:]:
            mean = keys[nearest == code, head].mean(0)
            torch.testing.assert_close(start["codes"][head, code], mean, atol=1e-9, rtol=0)
    assert torch.equal(start["codes"][0], fits.prototypes(keys[:, 0], keys[opens, 0].mean(0), 8))


def test_the_choice_passes_gradients_to_keys_and_codes():
    made, x = make(ALONE, SHAPE, torch.float64), Draw.of(SHAPE, 20, torch.float64)
    k = x.k.requires_grad_()
    features = made.feature_map.key(k)
    assert ((features == 0) | (features == 1)).all() and (features.sum(-1) == 1).all()
    weight = torch.arange(8, dtype=torch.float64)
    for given in torch.autograd.grad((features * weight).sum(), [k, made.feature_map.codes]):
        assert given.isfinite().all() and given.abs().max() > 0


def test_kernels_give_what_the_parts_do():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}
    for kind in ("torch", "triton"):
        made = make({**BESIDE, "feature_map": {"name": "codes", "dim": 16}}, SHAPE, torch.float32).to(device)
        x = Draw.of(SHAPE, 40, torch.float32, batch=1).apply(lambda y: y.to(device))
        step = Draw.of(SHAPE, 1, torch.float32, batch=1, seed=3).apply(lambda y: y.to(device))
        with dispatch.kernels(kind):
            out = x.run(made.chunked)
            grads = torch.autograd.grad(out.square().sum(), list(made.parameters()))
            state = made.initial_state(1, torch.float32, torch.device(device))
            with torch.no_grad():
                x.run(made.chunked, state=state)
                after = step.run(made.step, state=state)
        found[kind] = [out, after, *grads]
    for one, two in zip(*found.values(), strict=True):
        scale = max(1.0, two.abs().max().item())
        torch.testing.assert_close(one, two, atol=1e-4 * scale, rtol=0)
