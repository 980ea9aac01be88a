"""Token shift of decays and rates: the mixer without it on hidden states that were mixed by hand."""

from __future__ import annotations

import pytest
import torch
from compositions import SHAPES, Draw, make

from linearize.kernels import dispatch
from linearize.mixers import build

SHAPE = SHAPES["grouped"]


def mixer(shift, rule="rwkv7"):
    shifted = {"shift": True} if shift else {}
    update = {"name": "rwkv7", "rank": 3, **shifted} if rule == "rwkv7" else {"name": "rwkv6"}
    gate = {"name": rule, "rank": 3, **shifted}
    return {
        "feature_map": {"name": "identity"}, "gate": gate, "update": update, "normalizer": {"name": "none"},
    }  # fmt: skip


def pair(rule, mix):
    """With shift, both parts mixing alike, and without, of the same other parameters."""
    shifted, plain = (
        make(mixer(True, rule), SHAPE, torch.float64),
        make(mixer(False, rule), SHAPE, torch.float64),
    )
    names = {name for name, _ in shifted.named_parameters() if name.endswith(".mix")}
    assert names == {"recurrent.gate.mix", *(["recurrent.update.mix"] if rule == "rwkv7" else [])}
    values = {name: x for name, x in shifted.state_dict().items() if name not in names}
    plain.load_state_dict(values)
    with torch.no_grad():
        for name in names:
            shifted.get_parameter(name).copy_(mix)
    return shifted, plain


def by_hand(hidden, mix, firsts):
    """x + mix (x_before - x), where nothing stands before the first token of a document."""
    before = torch.zeros_like(hidden)
    for t in range(1, hidden.shape[1]):
        if t not in firsts:
            before[:, t] = hidden[:, t - 1]
    return hidden + mix * (before - hidden)


@pytest.mark.parametrize("rule", ["rwkv6", "rwkv7"])
def test_it_is_a_mixture_with_the_token_before(rule):
    mix = torch.linspace(-0.5, 1.5, 10, dtype=torch.float64)
    shifted, plain = pair(rule, mix)
    x = Draw.of(SHAPE, 50, torch.float64)
    starts = torch.zeros(2, 50, dtype=torch.bool)
    starts[:, [7, 30]] = True
    own = by_hand(x.hidden, mix, {7, 30})
    with torch.no_grad():
        expected = plain.chunked(x.q, x.k, x.v, hidden=own, plain=x.plain, starts=starts)
        torch.testing.assert_close(x.run(shifted.chunked, starts=starts), expected, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("rule", ["rwkv6", "rwkv7"])
def test_it_starts_as_the_mixer_without_it(rule):
    shifted, plain = pair(rule, 0.0)
    assert all(
        (p == 0).all() for n, p in build(mixer(True, rule), SHAPE).named_parameters() if n.endswith("mix")
    )
    x = Draw.of(SHAPE, 40, torch.float64)
    assert torch.equal(x.run(shifted.chunked), x.run(plain.chunked))


def test_kernels_give_what_the_parts_do():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}
    for kind in ("torch", "triton"):
        made = make(mixer(True), SHAPE, torch.float32).to(device)
        x = Draw.of(SHAPE, 40, torch.float32, batch=1).apply(lambda y: y.to(device))
        step = Draw.of(SHAPE, 1, torch.float32, batch=1, seed=3).apply(lambda y: y.to(device))
        with dispatch.kernels(kind):
            out = x.run(made.chunked)
            grads = torch.autograd.grad(out.square().sum(), list(made.parameters()))
            state = made.initial_state(1, torch.float32, torch.device(device))
            with torch.no_grad():
                x.run(made.chunked, state=state)
                after = step.run(made.step, state=state)
        found[kind] = [out, after, state["shift_gate"], *grads]
    for one, two in zip(*found.values(), strict=True):
        scale = max(1.0, two.abs().max().item())
        torch.testing.assert_close(one, two, atol=1e-4 * scale, rtol=0)
