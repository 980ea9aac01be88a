"""Several steps of the delta rule for each token, against a loop of their own, and where they begin."""

from __future__ import annotations

import pytest
import torch
from compositions import SHAPES, Draw, make
from kernel_calls import DEVICE, ON_GPU, TOLERANCE, error
from torch.nn import functional as F

from linearize.config import compose
from linearize.kernels import dispatch
from linearize.mixers import build
from linearize.mixers.calibration import Statistics

SHAPE = SHAPES["grouped"]
MIXER = {
    "feature_map": {"name": "identity", "l2_normalize": True},
    "gate": {"name": "mamba2"},
    "update": {"name": "delta_product", "rank": 3},
    "normalizer": {"name": "none"},
}
KDA = {**MIXER, "gate": {"name": "kda", "rank": 3}}


def loop(made, x, row):
    """One row by the paper's equations, a head, a token and a step at a time."""
    update, shape, tokens = made.update, made.shape, x.q.shape[1]
    decay = made.recurrent.gate(x.hidden, x.k)[row].exp()
    hidden, out = x.hidden[row], torch.zeros(tokens, shape.heads, shape.value_dim, dtype=torch.float64)
    heads, steps = update.heads, update.steps
    bias, weight = update.beta_bias, update.beta_weight.view(-1, steps, heads)
    down, up, base = (getattr(update.later, name) for name in ("down", "up", "base"))
    for head in range(shape.heads):
        m, key_head = head // (shape.heads // heads), head // shape.group
        state = torch.zeros(shape.key_dim, shape.value_dim, dtype=torch.float64)
        for t in range(tokens):
            kept = decay[t, m // (heads // decay.shape[1])]
            state = (kept[:, None] if kept.dim() else kept) * state
            for j in range(steps):
                key, value = x.k[row, t, key_head], x.v[row, t, key_head]
                key = key / key.norm()
                if j:
                    at = (j - 1) * heads + m
                    more = base[at] + (hidden[t] @ down) @ up[:, at]
                    key, value = key + more[: shape.key_dim], value + more[shape.key_dim :]
                    key = key / key.norm()
                beta = update.most * torch.sigmoid(hidden[t] @ weight[:, j, m] + bias[j, m])
                reflection = torch.eye(shape.key_dim, dtype=torch.float64) - beta * torch.outer(key, key)
                state = reflection @ state + beta * torch.outer(key, value)
            query = F.normalize(x.q[row, t, head], dim=0) * update.scale[head]
            out[t, head] = query @ state
    return out


@pytest.mark.parametrize("gate", ["mamba2", "kda"])
@pytest.mark.parametrize(("steps", "reflects"), [(2, False), (3, True)])
def test_it_is_its_equation(gate, steps, reflects):
    base = KDA if gate == "kda" else MIXER
    made = make(
        {**base, "update": {**MIXER["update"], "steps": steps, "reflects": reflects}}, SHAPE, torch.float64
    )
    x = Draw.of(SHAPE, 70, torch.float64)
    with torch.no_grad():
        out = x.run(made.chunked)
        for row in range(2):
            torch.testing.assert_close(out[row], loop(made, x, row), atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("reflects", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_it_starts_as_the_delta_rule(steps, reflects):
    """Calibrated too: n strengths make the one that the teacher's entropy asks for."""
    product = {**MIXER, "update": {**MIXER["update"], "steps": steps, "reflects": reflects}}
    x, outs = Draw.of(SHAPE, 40, torch.float64), {}

    class Known(Statistics):
        strength = torch.tensor([0.1, 0.3, 0.9, 0.2], dtype=torch.float64)

    known = Known(SHAPE, x.q, x.k, x.q, lambda: None)
    for name, mixer in (("product", product), ("delta", {**MIXER, "update": {"name": "delta"}})):
        made = build(mixer, SHAPE).double()
        made.reset_parameters()
        with torch.no_grad():
            started = x.run(made.chunked)
            made.update.calibrate(known)
            outs[name] = started, x.run(made.chunked)
    for one, two in zip(*outs.values(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-9, rtol=1e-8)


def test_recipe_starts_as_gated_deltanet():
    outs = []
    for name in ("gated_deltaproduct", "gated_deltanet"):
        torch.manual_seed(0)
        made = build(compose(name).mixer, SHAPE).double()
        torch.manual_seed(0)
        made.reset_parameters()
        torch.nn.init.zeros_(made.output.up)
        outs.append(Draw.of(SHAPE, 30, torch.float64).run(made.chunked))
    torch.testing.assert_close(*outs, atol=1e-8, rtol=1e-6)


def test_kernels_give_what_the_parts_do():
    """Beside float64, by the measure of the kernels' own tests, gradients three times that of outputs.

    Those of decays ten times: they are sums of differences over the text, in which a digit is lost in float32, and more
    on a card, whose tensor cores round towards zero.
    """
    rows = 2 if ON_GPU else 1  # the interpreter takes them one after the other
    found = {}
    for kind, dtype in (("torch", torch.float64), ("triton", torch.float32)):
        made = make(MIXER, SHAPE, torch.float32).to(DEVICE, dtype)
        x = Draw.of(SHAPE, 70, torch.float32, batch=rows).apply(lambda y, dtype=dtype: y.to(DEVICE, dtype))
        step = Draw.of(SHAPE, 1, torch.float32, batch=rows, seed=3)
        step = step.apply(lambda y, dtype=dtype: y.to(DEVICE, dtype))
        starts = torch.zeros(rows, 70, dtype=torch.bool, device=DEVICE)
        starts[0, [3, 41]] = True
        with dispatch.kernels(kind):
            out = x.run(made.chunked, starts=starts)
            grads = torch.autograd.grad(out.square().sum(), list(made.parameters()), allow_unused=True)
            state = made.initial_state(rows, dtype, torch.device(DEVICE))
            with torch.no_grad():
                x.run(made.chunked, starts=starts, state=state)
                after = step.run(made.step, state=state)
        named = zip(made.named_parameters(), grads, strict=True)
        gradients = {name: gradient for (name, _), gradient in named if gradient is not None}
        found[kind] = {"out": out, "after": after, "sums": state["sums"]}, gradients
    for one, exact, times in zip(found["triton"], found["torch"], (1, 3), strict=True):
        off = {name: error(one[name], exact[name]) / (10 if ".gate." in name else times) for name in exact}
        assert max(off.values()) < TOLERANCE[torch.float32], off
