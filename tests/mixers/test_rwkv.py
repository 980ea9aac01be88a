"""RWKV-6, RWKV-7 and RADLADS' forms of them against independent float64 loops written from the papers' equations."""

from __future__ import annotations

import math

import pytest
import torch
from compositions import Draw, make

from linearize.mixers import LayerShape, build, check

SHAPE = LayerShape(heads=4, kv_heads=2, key_dim=8, value_dim=6, scaling=8**-0.5, model_dim=10)
NONE = {"name": "none"}


def section(number: int, *, per: str = "kv_head", scaled: bool = True, **options) -> dict:
    name = f"rwkv{number}"
    update = {"rank": 3, **options} if number == 7 else options
    return {
        "feature_map": {"name": "identity", "scaled": scaled},
        "gate": {"name": name, "rank": 3, "per": per},
        "update": {"name": name, **update},
        "normalizer": NONE,
    }


def low_rank(x, part, tanh):
    """[M, F] for one token's x [D], an element at a time."""
    narrow = [sum(x[d] * part.down[d, r] for d in range(len(x))) for r in range(part.down.shape[1])]
    narrow = [torch.tanh(n) if tanh else n for n in narrow]
    return part.base + sum(n * part.up[r] for r, n in enumerate(narrow))


def decays(number, made, x):
    """w_t [M, F] of one token, by the paper's formula."""
    d = low_rank(x, made.recurrent.gate.logits, tanh=True)
    if number == 6:
        return torch.exp(torch.maximum(-torch.exp(d), torch.tensor(-5.0)))
    return torch.exp(-math.exp(-0.5) / (1 + torch.exp(-d)))


def rwkv6_loop(made, x, head):
    """Row vectors: S_t = diag(w_t) S_{t-1} + k_t^T v_t, o_t = r_t S_t, or r_t (S_{t-1} + diag(u) k_t^T v_t)."""
    update, outputs = made.update, []
    m, kv = head * update.heads // SHAPE.heads, head // SHAPE.group
    state = torch.zeros(8, 6, dtype=torch.float64)
    for t in range(x.q.shape[1]):
        w = decays(6, made, x.hidden[0, t])[m]
        r = x.q[0, t, head] * 8**-0.5
        k = x.k[0, t, kv] * (1 - w) if update.balanced else x.k[0, t, kv]
        new = torch.diag(w) @ state + torch.outer(k, x.v[0, t, kv])
        seen = new
        if update.bonus_weight is not None:
            seen = state + torch.diag(update.bonus_weight[m]) @ torch.outer(k, x.v[0, t, kv])
        outputs.append(r @ seen)
        state = new
    return torch.stack(outputs)


def rwkv7_loop(made, x, head, scaling):
    """S_t = S_{t-1} (diag(w_t) - kappa_t^T (a_t * kappa_t)) + v_t^T k~_t, o_t = r_t S_t^T; S is [V, K]."""
    update, outputs = made.update, []
    m, kv = head * update.heads // SHAPE.heads, head // SHAPE.group
    state = torch.zeros(6, 8, dtype=torch.float64)
    for t in range(x.q.shape[1]):
        w = decays(7, made, x.hidden[0, t])[m]
        a = 1 / (1 + torch.exp(-low_rank(x.hidden[0, t], update.rate, tanh=False)[m]))
        r, k, v = x.q[0, t, head] * scaling, x.k[0, t, kv], x.v[0, t, kv]
        if update.config.balanced:
            kappa, written = k / k.norm(), k * (1 - w + a)
        else:
            kappa, written = k * update.removal[m], k * (1 + (a - 1) * update.share[m])
            kappa = kappa / kappa.norm()
        state = state @ (torch.diag(w) - torch.outer(kappa, a * kappa)) + torch.outer(v, written)
        outputs.append(update.scale[head] * r @ state.T)
    return torch.stack(outputs)


@pytest.mark.parametrize("per", ["kv_head", "query_head"])
@pytest.mark.parametrize("balanced", [True, False], ids=["balanced", "sums"])
@pytest.mark.parametrize("bonus", [True, False], ids=["bonus", "plain"])
def test_rwkv6_equals_the_equation(per, balanced, bonus):
    made = make(section(6, per=per, balanced=balanced, bonus=bonus), SHAPE, torch.float64)
    x = Draw.of(SHAPE, 19, torch.float64, batch=1)
    expected = torch.stack([rwkv6_loop(made, x, head) for head in range(4)], 1)
    torch.testing.assert_close(x.run(made.chunked)[0], expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("per", ["kv_head", "query_head"])
@pytest.mark.parametrize("balanced", [True, False], ids=["radlads", "rwkv7"])
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
def test_rwkv7_equals_the_equation(per, balanced, scaled):
    made = make(section(7, per=per, balanced=balanced, scaled=scaled), SHAPE, torch.float64)
    x = Draw.of(SHAPE, 19, torch.float64, batch=1)
    scaling = 8**-0.5 if scaled else 1.0
    expected = torch.stack([rwkv7_loop(made, x, head, scaling) for head in range(4)], 1)
    torch.testing.assert_close(x.run(made.chunked)[0], expected, atol=1e-12, rtol=1e-12)


def started(mixer, **settings):
    """A mixer at its initial values."""
    torch.manual_seed(0)
    return build({**mixer, **settings}, SHAPE).double()


@pytest.mark.parametrize(("number", "slow", "fast"), [(6, -6.0, -1.0), (7, -6.5, -1.5)])
@pytest.mark.parametrize("per", ["kv_head", "query_head"])
def test_decays_start_on_the_published_curve(number, slow, fast, per):
    made = started(section(number, per=per))
    gate, channels = made.recurrent.gate, 8 * (2 if per == "kv_head" else 4)
    x = Draw.of(SHAPE, 5, torch.float64)
    curve = [slow + (fast - slow) * (n / (channels - 1)) ** gate.config.exponent for n in range(channels)]
    formula = {6: lambda d: -math.exp(d), 7: lambda d: -math.exp(-0.5) / (1 + math.exp(-d))}
    expected = [formula[number](d) for d in curve]
    log_decay = gate(x.hidden, x.k)
    assert log_decay.shape == (2, 5, channels // 8, 8)
    wanted = torch.tensor(expected, dtype=torch.float64).expand(2, 5, -1)
    torch.testing.assert_close(log_decay.flatten(2), wanted, atol=1e-7, rtol=1e-6)


def test_a_gate_can_start_nearer_the_teacher():
    near = section(6)
    near["gate"] = {**near["gate"], "slow": -9.0, "fast": -9.0}
    x = Draw.of(SHAPE, 40, torch.float64)
    plain = {"feature_map": {"name": "identity"}, "normalizer": NONE}
    unbalanced = started(near, update={"name": "rwkv6", "balanced": False})
    forgetting, nothing = x.run(unbalanced.chunked), x.run(started(plain).chunked)
    assert (forgetting - nothing).norm() < 0.01 * nothing.norm()


@pytest.mark.parametrize(("number", "lowest"), [(6, -5.0), (7, -math.exp(-0.5))])
def test_decays_have_a_floor(number, lowest):
    gate = make(section(number), SHAPE, torch.float64).recurrent.gate
    torch.nn.init.constant_(gate.logits.base, 50.0)
    x = Draw.of(SHAPE, 5, torch.float64)
    torch.testing.assert_close(gate(x.hidden, x.k), torch.full((2, 5, 2, 8), lowest, dtype=torch.float64))


def test_rates_and_scales_start_where_the_docstring_says():
    update = started(section(7, balanced=False)).update
    x = Draw.of(SHAPE, 5, torch.float64)
    torch.testing.assert_close(update.rate(x.hidden).sigmoid(), torch.full((2, 5, 2, 8), 0.5).double())
    for value, start in ((update.removal, 0.85), (update.share, 1.0), (update.scale, 0.03)):
        torch.testing.assert_close(value, torch.full_like(value, start), atol=1e-7, rtol=0)


def test_first_gradient_reaches_the_bottleneck():
    """W1 = 0 keeps every token on the curve, and W2 is not zero, so W1 learns from the first step on."""
    made = started(section(7))
    x = Draw.of(SHAPE, 12, torch.float64)
    x.run(made.chunked).square().sum().backward()
    for part in (made.recurrent.gate.logits, made.update.rate):
        assert part.down.abs().max() == 0 and part.down.grad.abs().max() > 0


def test_without_removal_rwkv7_is_balanced_rwkv6():
    mixer = section(7, scale=1.0)
    x = Draw.of(SHAPE, 70, torch.float64)
    seven = started({**mixer, "update": {**mixer["update"], "rate_base": -1e4}})
    six = started({**mixer, "update": {"name": "rwkv6"}})
    torch.testing.assert_close(x.run(seven.chunked), x.run(six.chunked), atol=1e-12, rtol=1e-12)


def test_a_full_rate_overwrites():
    """At a = 1 without forgetting, a key of length one that returns is answered by its last value alone."""
    mixer = section(7, scale=1.0, rate_base=1e4)
    made = started({**mixer, "gate": {**mixer["gate"], "slow": -1e4, "fast": -1e4}})
    x = Draw.of(SHAPE, 30, torch.float64, batch=1)
    x.k = (x.k / x.k.norm(dim=-1, keepdim=True))[:, :1].expand_as(x.k)
    x.q = x.k.repeat_interleave(2, 2) / SHAPE.scaling
    torch.testing.assert_close(x.run(made.chunked), x.v.repeat_interleave(2, 2), atol=1e-12, rtol=1e-12)


def test_unbalanced_rwkv6_is_the_additive_rule():
    mixer = section(6, balanced=False)
    x = Draw.of(SHAPE, 70, torch.float64)
    additive = make({**mixer, "update": {"name": "additive"}}, SHAPE, torch.float64)
    assert torch.equal(x.run(make(mixer, SHAPE, torch.float64).chunked), x.run(additive.chunked))


def test_balanced_state_is_an_average():
    """1 - w on the keys: with one key for all tokens, the weights of a long past sum to q.k itself."""
    made = started(section(6), gate={"name": "rwkv6", "rank": 3, "slow": -2.0, "fast": -1.0})
    x = Draw.of(SHAPE, 300, torch.float64, batch=1)
    x.k, x.v = x.k[:, :1].expand_as(x.k), torch.ones_like(x.v)
    scores = (x.q * x.k.repeat_interleave(2, 2)).sum(-1) * SHAPE.scaling
    torch.testing.assert_close(x.run(made.chunked)[:, -50:], scores[:, -50:, :, None].expand(-1, -1, -1, 6))


def test_query_heads_share_a_state_unless_asked():
    shared, own = (build(section(7, per=per), SHAPE) for per in ("kv_head", "query_head"))
    assert own.state_bytes() == SHAPE.group * shared.state_bytes()


@pytest.mark.parametrize(
    ("part", "options", "problem"),
    [
        (
            "gate",
            {"name": "rwkv6", "per": "head"},
            "mixer.gate.per: 'head' is not one of kv_head, query_head",
        ),
        (
            "gate",
            {"name": "rwkv6", "rank": 0},
            "mixer.gate.rank: must be at least 1 and at most 16384, got 0",
        ),
        ("gate", {"name": "rwkv7", "slow": 1.0}, "mixer.gate.slow: 1.0 must be at most fast (-1.5)"),
        (
            "gate",
            {"name": "rwkv7", "exponent": 0.0},
            "mixer.gate.exponent: must be above 0 and at most 100, got 0.0",
        ),
        (
            "update",
            {"name": "rwkv7", "scale": 0.0},
            "mixer.update.scale: must be above 0 and at most 1000000, got 0.0",
        ),
        (
            "update",
            {"name": "rwkv7", "rank": 0},
            "mixer.update.rank: must be at least 1 and at most 16384, got 0",
        ),
    ],
)
def test_options_are_checked(part, options, problem):
    assert problem in check({**section(7), part: options})


@pytest.mark.parametrize("name", ["rwkv6", "rwkv7"])
def test_rules_need_their_gate(name):
    (problem,) = check({**section(7), "update": {"name": name}, "gate": NONE})
    assert problem.startswith(f"mixer.gate: update '{name}' takes a gate per") and "rwkv7" in problem


def test_a_removing_rule_has_no_running_sum():
    problems = check({**section(7), "feature_map": {"name": "elu"}, "normalizer": {"name": "running_sum"}})
    assert problems and all(problem.startswith("mixer.normalizer: update 'rwkv7'") for problem in problems)


RECORDED = {
    6: [
        [0.143010, -0.536931, -0.964344],
        [-1.250952, -0.362010, 0.697191],
        [1.528369, 1.673284, 1.031227],
        [-0.375233, -1.446574, -1.837568],
        [-0.957950, 0.337424, 1.474102],
        [1.414854, 0.836779, -0.134846],
    ],
    7: [
        [0.207494, -0.779036, -1.399174],
        [-1.502802, -0.289610, 1.059791],
        [1.740518, 1.424607, 0.438681],
        [-0.410941, -0.948764, -1.040368],
        [-0.622017, -0.196341, 0.321677],
        [0.533983, 0.503998, 0.236976],
    ],
}
"""Outputs [T, V] of flash-linear-attention 0.6.0 on the inputs below: the maths of its RWKV-6 and RWKV-7 layers behind
the projections, without token shift and value residual, on its plain float32 recurrences (`naive_recurrent_rwkv6`,
`dplr_recurrence`)."""


def wave(seed: int, *size: int) -> torch.Tensor:
    return torch.sin(seed + 0.7 * torch.arange(math.prod(size), dtype=torch.float64)).view(size)


@pytest.mark.parametrize("number", [6, 7])
def test_equals_what_fla_recorded(number):
    shape = LayerShape(heads=1, kv_heads=1, key_dim=4, value_dim=3, scaling=0.5, model_dim=5)
    mixer = section(number, balanced=False, scaled=False, **({"bonus": True} if number == 6 else {"rank": 2}))
    mixer["gate"]["rank"] = 2
    made = build(mixer, shape).double()
    waves = {made.recurrent.gate.logits: 5}
    if number == 7:
        waves[made.update.rate] = 8
    with torch.no_grad():
        for part, seed in waves.items():
            for place, parameter in enumerate((part.down, part.up, part.base)):
                parameter.copy_(wave(seed + place, *parameter.shape))
            part.base.sub_(2)  # fla has no floor under RWKV-6's decay, so stay above it
        if number == 6:
            made.update.bonus_weight.copy_(wave(20, 1, 4))
        else:
            made.update.removal.copy_(wave(11, 1, 4))
            made.update.share.copy_(wave(12, 1, 4))
            made.update.scale.fill_(1.0)
    q, k, v = (wave(seed, 1, 6, 1, width) for seed, width in ((1, 4), (2, 4), (3, 3)))
    out = made.chunked(q, k, v, hidden=wave(4, 1, 6, 5))
    recorded = torch.tensor(RECORDED[number], dtype=torch.float64)
    torch.testing.assert_close(out[0, :, 0], recorded, atol=2e-6, rtol=0)
