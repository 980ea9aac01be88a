"""Sparse state expansion against a loop that touches only the states that a token takes."""

from __future__ import annotations

import pytest
import torch
from compositions import SHAPES, Draw, make
from kernel_calls import INTERPRETED, TOLERANCE

from linearize.kernels import dispatch
from linearize.mixers import build, check
from linearize.mixers.update.sorting import Places

SHAPE = SHAPES["grouped"]
MIXER = {
    "feature_map": {"name": "softmax_dim"},
    "gate": {"name": "low_rank", "rank": 3},
    "update": {"name": "sse", "states": 5, "active": 2},
    "normalizer": {"name": "none"},
}
PER_HEAD = {**MIXER, "gate": {"name": "mamba2"}, "normalizer": {"name": "running_sum"}}
UNGATED = {**MIXER, "gate": {"name": "none"}, "update": {"name": "sse", "states": 3}}
MIXERS = {"per feature": MIXER, "per head, divided": PER_HEAD, "ungated": UNGATED}


def loop(made, x, row, first, last):
    """Some tokens of one row, a document of their own."""
    branch, update, shape = made.recurrent, made.update, made.shape
    k, q = (x.k[row].softmax(-1), x.q[row].softmax(-1))
    decay = None if branch.gate is None else branch.gate(x.hidden, x.k)[row].exp()
    out = torch.zeros(last - first, shape.heads, shape.value_dim, dtype=torch.float64)
    for head in range(shape.heads):
        m, key_head = head // (shape.heads // update.heads), head // shape.group
        states = torch.zeros(update.states + 1, shape.key_dim, shape.value_dim + 1, dtype=torch.float64)
        for t in range(first, last):
            p = torch.softmax(x.hidden[row, t] @ update.choice, 0)
            taken = [(0, 1.0)] + [(i + 1, p[i]) for i in p.argsort(descending=True)[: update.active].tolist()]
            value = torch.cat([x.v[row, t, key_head], torch.ones(1, dtype=torch.float64)])
            found = torch.zeros(shape.value_dim + 1, dtype=torch.float64)
            for i, weight in taken:
                kept = 1.0 if decay is None else decay[t, m // (update.heads // decay.shape[1])]
                kept = kept[:, None] if isinstance(kept, torch.Tensor) and kept.dim() else kept
                states[i] = kept * states[i] + weight * torch.outer(k[t, key_head], value)
                found = found + weight * q[t, head] @ states[i]
            out[t - first, head] = found[:-1] / (found[-1] if update.running_sum else 1.0)
    return out


@pytest.mark.parametrize("name", MIXERS)
def test_it_is_its_equation(name):
    made, x = make(MIXERS[name], SHAPE, torch.float64), Draw.of(SHAPE, 60, torch.float64)
    starts, valid = torch.zeros(2, 60, dtype=torch.bool), torch.ones(2, 60, dtype=torch.bool)
    starts[0, 25], valid[1, :9] = True, False
    with torch.no_grad():
        shares = made.update.shares(type("", (), {"hidden": x.hidden})())[..., 1:]
        assert ((shares > 0).sum(-1) == made.update.active).all() and (shares > 0).any(1).all()
        out = x.run(made.chunked, starts=starts, valid=valid)
        for row, first, last in ((0, 0, 25), (0, 25, 60), (1, 9, 60)):
            expected = loop(made, x, row, first, last)
            torch.testing.assert_close(out[row, first:last], expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("name", MIXERS)
def test_sorted_tokens_have_the_gradients_of_the_definition(name):
    """With padding and documents; and a text that comes in pieces gives what it gives at once."""
    made = make(MIXERS[name], SHAPE, torch.float64)
    starts, valid = torch.zeros(2, 21, dtype=torch.bool), torch.ones(2, 21, dtype=torch.bool)
    starts[0, 8], valid[1, :5] = True, False
    found = []
    for form in (made.parallel, made.chunked):
        x = Draw.of(SHAPE, 21, torch.float64).apply(lambda y: y.requires_grad_())
        out = x.run(form, starts=starts, valid=valid) * valid[..., None, None]
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        wanted = [x.q, x.k, x.v, x.hidden, *made.parameters()]
        found.append([out, *torch.autograd.grad((out * weight).sum(), wanted)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-8)
    x, state = Draw.of(SHAPE, 21, torch.float64), made.initial_state(2, torch.float64, torch.device("cpu"))
    with torch.no_grad():
        parts = [piece.run(made.chunked, state=state) for piece in (x[:9], x[9:])]
        torch.testing.assert_close(torch.cat(parts, 1), x.run(made.chunked), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("copies", [1, 3])
def test_what_is_sorted_comes_back(copies):
    """In the order of states, and in each in that of the text."""
    taken = torch.randint(4, (2, 11, copies), generator=torch.Generator().manual_seed(1))
    places = Places.of(taken, 4)
    owner = places.sort(taken.flatten(1), copies=True)
    order = torch.sort(taken.flatten(1), stable=True)
    assert torch.equal(owner, order.values) and torch.equal(places.copy, order.indices)
    x = torch.randn(2, 11, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 11 * copies, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(places.back(places.sort(x)), copies * x)
    assert torch.autograd.gradcheck(places.sort, (x,)) and torch.autograd.gradcheck(places.back, (y,))


def test_a_state_that_nobody_takes_stays_as_it_is():
    made = make(MIXER, SHAPE, torch.float64)
    made.update.choice.data.zero_()
    made.update.choice.data[:, [0, 1]] = 10.0
    x = Draw.of(SHAPE, 30, torch.float64)
    x.hidden.abs_()
    state = made.initial_state(2, torch.float64, torch.device("cpu"))
    state["state_sums"].fill_(1.0)
    with torch.no_grad():
        x[:29].run(made.chunked, state=state)
        x[29:].run(made.step, state=state)
    changed = (state["state_sums"] != 1).flatten(2).any(-1)
    assert changed.tolist() == [[True, True, True, False, False, False]] * 2


@pytest.mark.parametrize("name", [pytest.param("per feature", marks=INTERPRETED), "per head, divided"])
def test_kernels_give_what_the_parts_do(name):
    """Outputs, the carried states and gradients, in Triton's interpreter where there is no GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mixer = {**MIXERS[name], "update": {"name": "sse", "states": 2}}
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
        found[kind] = [out, after, state["state_sums"], *grads]
    for one, two in zip(*found.values(), strict=True):
        scale = max(1.0, two.abs().max().item())
        torch.testing.assert_close(one, two, atol=2 * TOLERANCE[torch.float32] * scale, rtol=0)


def test_all_states_would_be_none_chosen():
    (problem,) = check({**MIXER, "update": {"name": "sse", "states": 3, "active": 3}})
    assert "active: 3 of 3 states would be all" in problem
    assert build(MIXER, SHAPE).update.choice.std() > 0
