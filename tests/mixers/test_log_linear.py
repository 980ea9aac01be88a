"""Log-linear attention against a Fenwick tree that carries like a binary counter, and against the rule it starts as."""

from __future__ import annotations

import math

import pytest
import torch
from compositions import SHAPES, Draw, make
from kernel_calls import INTERPRETED
from torch.nn import functional as F

from linearize.config import compose
from linearize.kernels import dispatch
from linearize.mixers import build, check
from linearize.mixers.update import levels as levels_file
from linearize.mixers.update.levels import Levels

SHAPE = SHAPES["grouped"]
IDENTITY = {"feature_map": {"name": "identity"}, "normalizer": {"name": "none"}}
BASES = {
    "additive": {"feature_map": {"name": "elu"}},
    "additive mamba2": {**IDENTITY, "gate": {"name": "mamba2"}},
    "additive per feature": {"feature_map": {"name": "elu"}, "gate": {"name": "low_rank", "rank": 3}},
    "delta": {**IDENTITY, "update": {"name": "delta"}},
    "delta mamba2": {**IDENTITY, "gate": {"name": "mamba2"}, "update": {"name": "delta"}},
    "delta kda": {**IDENTITY, "gate": {"name": "kda", "rank": 3}, "update": {"name": "delta"}},
}
bases = pytest.mark.parametrize("name", BASES)
JOINED = ("additive mamba2", "delta", "delta mamba2")
"""Whose levels are read together."""


def on_levels(base, **options):
    name = "log_linear_delta" if base.get("update", {}).get("name") == "delta" else "log_linear"
    return {**base, "update": {"name": name, **options}}


class Tree:
    """Stretches of one head's past, newest first, each with its state and, where the rule has one, its norm."""

    def __init__(self, levels, block, size):
        self.levels, self.block, self.size = levels, block, size
        self.tokens, self.own, self.far, self.counted = 0, self.empty(), self.empty(), []

    def empty(self):
        return torch.zeros(self.size, dtype=torch.float64)

    def advance(self):
        """Before a token: a block that is full is carried into the stretches, as a bit into a counter."""
        if self.tokens and self.tokens % self.block == 0:
            level, moved, self.own = 1, self.own, self.empty()
            while self.counted and self.counted[0][0] == level:
                moved = moved + self.counted.pop(0)[1]
                level += 1
            if level > self.levels:
                self.far = self.far + moved
            else:
                self.counted.insert(0, (level, moved))
        self.tokens += 1

    def change(self, function):
        self.own, self.far = function(self.own), function(self.far)
        self.counted = [(level, function(state)) for level, state in self.counted]

    def read(self, query, shares):
        total = shares[0] * (query @ self.own) + shares[self.levels + 1] * (query @ self.far)
        for level, state in self.counted:
            total = total + shares[level] * (query @ state)
        return total


def loop(made, x, row):
    """One row, a head and a token at a time; a column of ones beside the values is the running sum."""
    update, shape, tokens = made.update, made.shape, x.q.shape[1]
    gate = made.recurrent.gate
    decay = None if gate is None else gate(x.hidden, x.k)[row].exp()
    delta, sums = update.name == "log_linear_delta", update.running_sum and update.sums_weights
    phi = made.recurrent.feature_map
    q, k = phi.query(x.q, None)[row], phi.key(x.k, None)[row]
    weight = update.level_weight.unflatten(-1, update.level_bias.shape)
    out = torch.zeros(tokens, shape.heads, shape.value_dim, dtype=torch.float64)
    for head in range(shape.heads):
        m, n = head // (shape.heads // update.heads), head // shape.group
        tree = Tree(update.levels, update.block, (k.shape[-1], shape.value_dim + 1))
        for t in range(tokens):
            tree.advance()
            key, value = k[t, n], torch.cat([x.v[row, t, n], torch.ones(1, dtype=torch.float64)])
            if decay is not None:
                kept = decay[t, m // (update.heads // decay.shape[1])]
                tree.change(lambda s, kept=kept: (kept[:, None] if kept.dim() else kept) * s)
            query = q[t, head]
            if delta:
                key, query = F.normalize(key, dim=0), F.normalize(query, dim=0) * update.scale[head]
                beta = torch.sigmoid(x.hidden[row, t] @ update.beta_weight[:, m] + update.beta_bias[m])
                tree.change(lambda s, key=key, beta=beta: s - beta * torch.outer(key, key @ s))
                value = beta * value
            tree.own = tree.own + torch.outer(key, value)
            shares = F.softplus(x.hidden[row, t] @ weight[:, head] + update.level_bias[head])
            read = tree.read(query, shares)
            out[t, head] = read[:-1] / read[-1] if sums else read[:-1]
    return out


@pytest.fixture
def apart(monkeypatch):
    """Levels are read one after the other, also where they could be read in one chain of launches."""
    monkeypatch.setattr(Levels, "joined", False)


@bases
@pytest.mark.parametrize(("levels", "block"), [(10, 1), (3, 1), (2, 4)])
def test_it_is_a_fenwick_tree(name, levels, block):
    made = make(on_levels(BASES[name], levels=levels, block=block), SHAPE, torch.float64)
    x = Draw.of(SHAPE, 37, torch.float64, batch=1)
    with torch.no_grad():
        torch.testing.assert_close(x.run(made.chunked)[0], loop(made, x, 0), atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("name", JOINED)
@pytest.mark.parametrize(("levels", "block"), [(10, 1), (2, 4)])
def test_level_by_level_it_is_one_too(name, levels, block, apart):
    test_it_is_a_fenwick_tree(name, levels, block)


def read(made, x, lengths, valid, starts):
    """Outputs of pieces, the state behind them, and every gradient, of the inputs too."""
    x = x.apply(lambda y: y.clone().requires_grad_())
    state, parts, first = made.initial_state(2, torch.float64, x.q.device), [], 0
    for length in lengths:
        piece = slice(first, first + length)
        parts.append(x[piece].run(made.chunked, valid=valid[:, piece], starts=starts[:, piece], state=state))
        first += length
    out = torch.cat(parts, 1) * valid[..., None, None]
    wanted = [*x.tensors, *made.parameters()]
    found = torch.autograd.grad(out.square().sum(), wanted, allow_unused=True)
    return [out, state["stretch_sums"], *(y for y in found if y is not None)]


@pytest.mark.parametrize("name", JOINED)
@pytest.mark.parametrize(("levels", "block"), [(10, 16), (3, 1), (2, 8)])
@pytest.mark.parametrize("lengths", [(150,), (70, 1, 13, 66)])
def test_together_or_apart(name, levels, block, lengths, monkeypatch):
    """The same outputs, states and gradients over several chunks, padded, packed, and from what was carried."""
    made = make(on_levels(BASES[name], levels=levels, block=block), SHAPE, torch.float64)
    x = Draw.of(SHAPE, 150, torch.float64)
    valid = torch.arange(150) >= torch.tensor([[0], [21]])
    starts = torch.zeros(2, 150, dtype=torch.bool)
    starts[0, [3, 40, 41]] = starts[1, [90]] = True
    found = []
    for joined in (True, False):
        monkeypatch.setattr(Levels, "joined", joined)
        found.append(read(made, x, lengths, valid, starts))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=1e-8, rtol=1e-7)


@pytest.mark.parametrize("name", ["additive per feature", "delta mamba2"])
@pytest.mark.parametrize(("levels", "block"), [(10, 1), (2, 1), (2, 4)])
def test_the_state_is_that_of_a_counter(name, levels, block):
    """However the text came, it is the same, and a level whose bit is not set is zero."""
    made = make(on_levels(BASES[name], levels=levels, block=block), SHAPE, torch.float64)
    x = Draw.of(SHAPE, 23, torch.float64)
    alone = made.initial_state(2, torch.float64, x.q.device)
    with torch.no_grad():
        for tokens in range(1, 24):
            x[tokens - 1 : tokens].run(made.step, state=alone)
            pieces = made.initial_state(2, torch.float64, x.q.device)
            for start in range(0, tokens, 7):
                x[start : min(start + 7, tokens)].run(made.chunked, state=pieces)
            count = (tokens - 1) // block
            for key in (key for key in alone if key.startswith("stretch_")):
                torch.testing.assert_close(alone[key], pieces[key], atol=1e-12, rtol=1e-10)
                for level in range(1, levels + 2):
                    set_ = count >> levels > 0 if level > levels else count >> (level - 1) & 1
                    assert bool(alone[key][:, level].any()) == bool(set_), (tokens, level)
                    assert bool(pieces[key][:, level].any()) == bool(set_), (tokens, level)


@bases
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_equal_weights_are_the_rule_itself(name, weight):
    """In every form and whatever was carried; one is the start, another a factor, by which a running sum divides."""
    x, outs = Draw.of(SHAPE, 60, torch.float64), []
    for mixer in (on_levels(BASES[name], levels=4), BASES[name]):
        torch.manual_seed(0)
        made = build(mixer, SHAPE).double()
        made.reset_parameters()
        factor = 1.0
        if hasattr(made.update, "level_bias"):
            torch.nn.init.constant_(made.update.level_bias, math.log(math.expm1(weight)))
            factor = 1.0 if made.recurrent.normalizer.running_sum else weight
        if made.recurrent.gate is not None and hasattr(made.recurrent.gate, "logits"):
            torch.nn.init.zeros_(made.recurrent.gate.logits.up)
        state = made.initial_state(2, torch.float64, x.q.device)
        with torch.no_grad():
            parts = [x[:40].run(made.chunked, state=state)]
            parts += [x[t : t + 1].run(made.step, state=state) for t in range(40, 60)]
            outs.append([y / factor for y in (torch.cat(parts, 1), x.run(made.parallel))])
    for one, two in zip(*outs, strict=True):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("name", [pytest.param("additive mamba2", marks=INTERPRETED), "delta mamba2"])
def test_kernels_give_what_the_parts_do(name):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}
    for kind in ("torch", "triton"):
        made = make(on_levels(BASES[name], levels=1, block=16), SHAPE, torch.float32).to(device)
        x = Draw.of(SHAPE, 40, torch.float32, batch=1).apply(lambda y: y.to(device))
        step = Draw.of(SHAPE, 1, torch.float32, batch=1, seed=3).apply(lambda y: y.to(device))
        with dispatch.kernels(kind):
            out = x.run(made.chunked)
            grads = torch.autograd.grad(out.square().sum(), list(made.parameters()), allow_unused=True)
            state = made.initial_state(1, torch.float32, torch.device(device))
            with torch.no_grad():
                x.run(made.chunked, state=state)
                after = step.run(made.step, state=state)
        found[kind] = [out, after, state["stretch_sums"], *(g for g in grads if g is not None)]
    for place, (one, two) in enumerate(zip(*found.values(), strict=True)):
        scale = max(1.0, two.abs().max().item())
        # against float64 the kernels' gradients of the gate stand at 5e-4: differences of sums over the text
        torch.testing.assert_close(one, two, atol=(1e-4 if place < 3 else 1e-3) * scale, rtol=0)


def test_the_state_has_a_fixed_size():
    made, base = (build(mixer, SHAPE) for mixer in (on_levels(BASES["delta"], levels=7), BASES["delta"]))
    assert made.has_fixed_state
    own, one = (m.initial_state(1, torch.float32, torch.device("cpu")) for m in (made, base))
    assert own["stretch_sums"].numel() == 9 * one["sums"].numel()
    assert made.state_bytes() == 9 * base.state_bytes() + 8  # and how many tokens were seen


def test_a_long_text_calls_the_rule_once_a_doubling(monkeypatch, apart):
    """Not once a token: the calls of the chunked form that trains."""
    from linearize.mixers.update import delta

    calls = []
    given = delta.delta_chunk
    monkeypatch.setattr(delta, "delta_chunk", lambda *a, **b: calls.append(1) or given(*a, **b))
    made, counts = make(on_levels(BASES["delta"]), SHAPE, torch.float32), []
    for tokens in (64, 128, 256):
        calls.clear()
        Draw.of(SHAPE, tokens, torch.float32).run(made.chunked)
        counts.append(len(calls))
    assert counts == [7, 8, 9]


@pytest.mark.parametrize("name", BASES)
def test_together_a_text_is_one_call(name, monkeypatch):
    """Where decays are a head's and no sum runs along; the others call their rule once a level."""
    calls = []
    given = levels_file.stretches_chunk
    monkeypatch.setattr(levels_file, "stretches_chunk", lambda *a, **b: calls.append(1) or given(*a, **b))
    made = make(on_levels(BASES[name]), SHAPE, torch.float32)
    Draw.of(SHAPE, 64, torch.float32).run(made.chunked)
    assert len(calls) == (name in JOINED)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"block": 3}, "mixer.update.block: 3 is no power of two, which stretches are"),
        ({"start": True}, "mixer.update.start: a learned start was written at no time, and so has no level"),
    ],
)
def test_options_are_checked(options, problem):
    assert check(on_levels(BASES["delta"], **options))[0].startswith(problem)


def test_recipe_starts_as_gated_deltanet():
    outs = []
    for name in ("log_linear_gated_deltanet", "gated_deltanet"):
        torch.manual_seed(0)
        made = build(compose(name).mixer, SHAPE).double()
        torch.nn.init.zeros_(made.output.up)
        outs.append(Draw.of(SHAPE, 60, torch.float64).run(made.chunked))
    torch.testing.assert_close(*outs, atol=1e-10, rtol=1e-9)
