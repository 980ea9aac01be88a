"""mLSTM's input gate and the bounded denominator against the papers' stabilized loop."""

from __future__ import annotations

import pytest
import torch
from compositions import SHAPES, Draw, make
from torch.nn import functional as F

from linearize.kernels import dispatch
from linearize.mixers import build, check

SHAPE = SHAPES["grouped"]
MIXER = {
    "feature_map": {"name": "identity"},
    "gate": {"name": "scalar", "per": "kv_head"},
    "update": {"name": "mlstm"},
    "normalizer": {"name": "bounded"},
}


def loop(made, x, row):
    """One row, with the running maximum of the first paper taken off every exponent."""
    update, gate, shape, tokens = made.update, made.recurrent.gate, made.shape, x.q.shape[1]
    out = torch.zeros(tokens, shape.heads, shape.value_dim, dtype=torch.float64)
    for head in range(shape.heads):
        n = head // shape.group
        state = torch.zeros(shape.key_dim, shape.value_dim, dtype=torch.float64)
        norm, top = torch.zeros(shape.key_dim, dtype=torch.float64), torch.tensor(-1e30, dtype=torch.float64)
        for t in range(tokens):
            hidden = x.hidden[row, t]
            logit = hidden @ update.input_weight[:, n] + update.input_bias[n]
            logit = update.cap * torch.tanh(logit / update.cap)
            forget = F.logsigmoid(hidden @ gate.weight[:, n] + gate.bias[n])
            before, top = top, torch.maximum(forget + top, logit)
            keep, add = torch.exp(forget + before - top), torch.exp(logit - top)
            state = keep * state + add * torch.outer(x.k[row, t, n], x.v[row, t, n])
            norm = keep * norm + add * x.k[row, t, n]
            query = x.q[row, t, head] * shape.scaling
            out[t, head] = (query @ state) / torch.maximum((query @ norm).abs(), torch.exp(-top))
    return out


def test_it_is_the_papers_cell():
    made, x = make(MIXER, SHAPE, torch.float64), Draw.of(SHAPE, 60, torch.float64)
    with torch.no_grad():
        out = x.run(made.chunked)
        for row in range(2):
            torch.testing.assert_close(out[row], loop(made, x, row), atol=1e-8, rtol=1e-8)


def test_it_starts_as_the_additive_rule():
    x, outs = Draw.of(SHAPE, 40, torch.float64), []
    for name in ("mlstm", "additive"):
        torch.manual_seed(0)
        outs.append(x.run(build({**MIXER, "update": {"name": name}}, SHAPE).double().chunked))
    assert torch.equal(*outs)


def test_a_large_gate_stays_finite_in_float32():
    made, x = build(MIXER, SHAPE), Draw.of(SHAPE, 300, torch.float32)
    torch.nn.init.constant_(made.update.input_bias, 1e4)
    assert x.run(made.chunked).isfinite().all()


def test_kernels_give_what_the_parts_do():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = 2 if device == "cuda" else 1  # the interpreter takes them one after the other
    found = {}
    for kind in ("torch", "triton"):
        made = make(MIXER, SHAPE, torch.float32).to(device)
        # random denominators of any sign pass the floor, where rounding is a jump in slope
        torch.nn.init.normal_(made.update.input_weight, std=0.1)
        x = Draw.of(SHAPE, 70, torch.float32, batch=rows).apply(lambda y: y.to(device))
        with dispatch.kernels(kind):
            out = x.run(made.chunked)
            grads = torch.autograd.grad(out.square().sum(), list(made.parameters()))
        found[kind] = [out, *grads]
    for one, two in zip(*found.values(), strict=True):
        scale = max(1.0, two.abs().max().item())
        torch.testing.assert_close(one, two, atol=1e-3 * scale, rtol=0)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"normalizer": {"name": "running_sum"}}, "mixer.feature_map: 'identity' has signed features"),
        (
            {"window": {"name": "sliding", "overlap": True}},
            "mixer.combine: 'shared_normalizer' shares the running sum, which normalizer 'bounded' does not keep",
        ),
    ],
)
def test_what_it_cannot_divide(changes, problem):
    assert any(found.startswith(problem) for found in check({**MIXER, **changes}))
