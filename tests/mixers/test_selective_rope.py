"""Angles that follow the text, against sums over pairs of tokens, and where they begin."""

from __future__ import annotations

import pytest
import torch
from compositions import SHAPES, Draw, make

from linearize.config import compose
from linearize.kernels import dispatch
from linearize.mixers import LayerShape, build, check

SHAPE = SHAPES["grouped"]
POSITION = {"name": "selective_rope", "rank": 3}
LINEAR = {"feature_map": {"name": "identity"}, "normalizer": {"name": "none"}, "position": POSITION}
GATED = {**LINEAR, "gate": {"name": "mamba2"}}


def pairs(made, x, row):
    """One row as sums over pairs of tokens, planes as complex numbers."""
    position, shape, tokens = made.position, made.shape, x.q.shape[1]
    angles = position.angles
    step = angles.base + torch.einsum("td,dr,rmf->tmf", x.hidden[row], angles.down, angles.up)
    logs = made.recurrent.gate(x.hidden, x.k)[row]
    whole = made.recurrent.feature_map
    out = torch.zeros(tokens, shape.heads, shape.value_dim, dtype=torch.float64)
    planes = position.planes

    def complex_of(y):
        return torch.complex(y[:planes], y[planes : 2 * planes]), y[2 * planes :]

    scale = (
        whole.query(torch.ones_like(x.q), None)[0, 0, 0, 0]
        * whole.key(torch.ones_like(x.k), None)[0, 0, 0, 0]
    )
    for head in range(shape.heads):
        n = head // shape.group
        for t in range(tokens):
            query, fixed = complex_of(x.q[row, t, head])
            for s in range(t + 1):
                key, still = complex_of(x.k[row, s, n])
                between = step[s + 1 : t + 1, n].sum(0)
                turned = (query.conj() * torch.polar(torch.ones_like(between), -between) * key).real.sum()
                weight = scale * (turned + fixed @ still) * logs[s + 1 : t + 1, head].sum().exp()
                out[t, head] += weight * x.v[row, s, n]
    return out


@pytest.mark.parametrize("width", [0, 4])
def test_a_key_is_seen_under_the_angles_since_it(width):
    made = make({**GATED, "position": {**POSITION, "width": width}}, SHAPE, torch.float64)
    x = Draw.of(SHAPE, 25, torch.float64)
    with torch.no_grad():
        out = x.run(made.chunked)
        for row in range(2):
            torch.testing.assert_close(out[row], pairs(made, x, row), atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize(
    "parts",
    [
        {"feature_map": {"name": "hedgehog", "dim": 8}},
        {"feature_map": {"name": "hedgehog", "dim": 8}, "window": {"name": "sliding", "size": 5, "overlap": True}},
        {"feature_map": {"name": "identity"}, "gate": {"name": "kda", "rank": 3}, "update": {"name": "delta"},
         "normalizer": {"name": "none"}},
    ],
)  # fmt: skip
def test_it_starts_as_the_teachers_rotation(parts, recurrent):
    outs = []
    for position in (POSITION, {"name": "rope"}):
        torch.manual_seed(0)
        made = build({**parts, "position": {**position, "recurrent": recurrent}}, SHAPE).double()
        if "gate" in parts:
            torch.nn.init.zeros_(made.recurrent.gate.logits.up)
        outs.append(Draw.of(SHAPE, 30, torch.float64).run(made.chunked))
    assert torch.equal(*outs)


def test_recipe_starts_as_gated_deltanet_with_rope():
    outs = []
    for name, overrides in (
        ("gated_deltanet_selective", []),
        ("gated_deltanet", ["mixer.position.recurrent=true"]),
    ):
        torch.manual_seed(0)
        made = build(compose(name, overrides).mixer, SHAPE).double()
        torch.nn.init.zeros_(made.output.up)
        outs.append(Draw.of(SHAPE, 30, torch.float64).run(made.chunked))
    assert torch.equal(*outs)


def test_kernels_give_what_the_parts_do():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = 2 if device == "cuda" else 1  # the interpreter takes them one after the other
    mixer = {"feature_map": {"name": "hedgehog", "dim": 16}, "position": POSITION}
    shape = LayerShape(4, 2, 16, 16, 0.25, model_dim=10)
    found = {}
    for kind in ("torch", "triton"):
        made = make(mixer, shape, torch.float32).to(device)
        assert made.fused is None  # one kernel for all takes q and k as they come
        x = Draw.of(shape, 70, torch.float32, batch=rows).apply(lambda y: y.to(device))
        step = Draw.of(shape, 1, torch.float32, batch=rows, seed=3).apply(lambda y: y.to(device))
        with dispatch.kernels(kind):
            out = x.run(made.chunked)
            grads = torch.autograd.grad(out.square().sum(), list(made.parameters()))
            state = made.initial_state(rows, torch.float32, torch.device(device))
            with torch.no_grad():
                x.run(made.chunked, state=state)
                after = step.run(made.step, state=state)
        found[kind] = [out, after, state["phase"], *grads]
    for one, two in zip(*found.values(), strict=True):
        scale = max(1.0, two.abs().max().item())
        torch.testing.assert_close(one, two, atol=1e-4 * scale, rtol=0)


@pytest.mark.parametrize(
    ("mixer", "problem"),
    [
        (
            {"feature_map": {"name": "relu"}, "window": {"name": "sliding"}, "position": POSITION},
            "mixer.position: 'selective_rope' needs keys at their own time; give the window overlap: true",
        ),
        (
            {"window": {"name": "sliding"}, "position": POSITION},
            "mixer.position: 'selective_rope' turns the recurrent branch alone, which needs a feature map; use rope",
        ),
        (
            {**LINEAR, "position": {**POSITION, "width": 3}},
            "mixer.position.width: 3 is odd, and planes have two dims",
        ),
    ],
)
def test_where_it_makes_no_sense(mixer, problem):
    assert any(found.startswith(problem) for found in check(mixer)), check(mixer)
