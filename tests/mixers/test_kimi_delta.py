"""Kimi Delta Attention and Gated DeltaNet-2 against loops of their own and what flash-linear-attention gives."""

from __future__ import annotations

import math

import pytest
import torch
from compositions import SHAPES, Draw, make
from torch.nn import functional as F

from linearize.config import compose
from linearize.mixers import LayerShape, build, check

SHAPE = SHAPES["grouped"]
GATE = {"name": "kda", "rank": 3}
MIXER = {
    "feature_map": {"name": "identity", "l2_normalize": True},
    "gate": GATE,
    "update": {"name": "delta"},
    "normalizer": {"name": "none"},
    "output": {"name": "gated_norm", "rank": 3},
    "position": {"name": "rope", "recurrent": False},
}
CONVOLVED = {**MIXER, "short_conv": {"name": "depthwise", "roles": "qkv"}}


def low_rank(part, hidden):
    return part.base + torch.einsum("td,dr,rmf->tmf", hidden, part.down, part.up)


def convolved(made, x, role):
    """[T, heads, width] -> the same, tap by tap."""
    taps = made.recurrent.short_conv.filters[role]
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for back in range(min(4, t + 1)):
            out[t] += x[t - back] * taps[..., 3 - back]
    return out


def loop(made, x, row, *, erase, write):
    """One row of a batch by the papers' equations, a head and a token at a time; `erase`, `write` [T, M, F or V]."""
    q, k, v = x.plain[0][row], x.plain[1][row], x.v[row]
    if made.recurrent.short_conv is not None:
        q, k, v = (convolved(made, y, role) for y, role in ((q, "q"), (k, "k"), (v, "v")))
    hidden, out = x.hidden[row], torch.zeros(q.shape[0], q.shape[1], v.shape[-1], dtype=torch.float64)
    decay = torch.exp(
        -made.recurrent.gate.a_log.exp()[:, None] * F.softplus(low_rank(made.recurrent.gate.logits, hidden))
    )
    heads, group = decay.shape[1], q.shape[1] // decay.shape[1]
    per_key = heads // k.shape[1]
    for m in range(heads):
        state = torch.zeros(k.shape[-1], v.shape[-1], dtype=torch.float64)
        for t in range(q.shape[0]):
            key, value = k[t, m // per_key], v[t, m // per_key]
            key = key / key.norm()
            state = decay[t, m][:, None] * state
            state = state - torch.outer(key, (erase[t, m] * key) @ state)
            state = state + torch.outer(key, write[t, m] * value)
            for g in range(group):
                head = m * group + g
                query = q[t, head] / q[t, head].norm() * made.update.scale[head]
                read = query @ state
                norm = torch.sqrt(read.square().mean() + 1e-5)
                gate = torch.sigmoid(low_rank(made.output.gate, hidden)[t, head])
                out[t, head] = read / norm * made.output.scale[head] * gate
    return out


@pytest.mark.parametrize("mixer", [MIXER, CONVOLVED, {**MIXER, "gate": {**GATE, "per": "query_head"}}])
def test_kimi_delta_is_its_equation(mixer):
    made, x = make(mixer, SHAPE, torch.float64), Draw.of(SHAPE, 70, torch.float64)
    out = x.run(made.chunked)
    for row in range(2):
        beta = (x.hidden[row] @ made.update.beta_weight + made.update.beta_bias).sigmoid()[..., None]
        expected = loop(made, x, row, erase=beta, write=beta)
        torch.testing.assert_close(out[row], expected, atol=1e-10, rtol=1e-8)


def test_gated_deltanet_2_is_its_equation():
    made = make({**CONVOLVED, "update": {"name": "gdn2"}}, SHAPE, torch.float64)
    x, update = Draw.of(SHAPE, 70, torch.float64), made.update
    out = x.run(made.chunked)
    for row in range(2):
        gates = {
            side: (torch.einsum("td,dmf->tmf", x.hidden[row], weight) + bias).sigmoid()
            for side, weight, bias in (
                ("erase", update.erase_weight, update.erase_bias),
                ("write", update.write_weight, update.write_bias),
            )
        }
        torch.testing.assert_close(out[row], loop(made, x, row, **gates), atol=1e-10, rtol=1e-8)


def test_one_number_for_all_dims_is_kimi_delta():
    """Outputs, and the weights that objectives of mixing matrices look at."""
    two, one = (make({**MIXER, "update": {"name": n}}, SHAPE, torch.float64) for n in ("gdn2", "delta"))
    x = Draw.of(SHAPE, 70, torch.float64)
    with torch.no_grad():
        for weight, bias in (
            (two.update.erase_weight, two.update.erase_bias),
            (two.update.write_weight, two.update.write_bias),
        ):
            weight.copy_(one.update.beta_weight[..., None].expand_as(weight))
            bias.copy_(one.update.beta_bias[:, None].expand_as(bias))
        two.update.scale.copy_(one.update.scale)
        for part in ("recurrent.gate", "output"):
            two.get_submodule(part).load_state_dict(one.get_submodule(part).state_dict())
    torch.testing.assert_close(x.run(two.chunked), x.run(one.chunked), atol=1e-11, rtol=1e-9)
    context = {"hidden": x.hidden, "plain": x.plain}
    weights = [made.parallel(x.q, x.k, None, **context) for made in (two, one)]
    torch.testing.assert_close(*weights, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("lowest", [0.0, -5.0])
@pytest.mark.parametrize("per", ["kv_head", "query_head"])
def test_half_lives_start_spread_over_every_head(lowest, per):
    gate = build({**MIXER, "gate": {**GATE, "lowest": lowest, "per": per}}, SHAPE).double().recurrent.gate
    gate.reset_parameters()
    x = Draw.of(SHAPE, 5, torch.float64)
    lives = math.log(2) / -gate(x.hidden, x.k)
    assert lives.shape == (2, 5, 4 if per == "query_head" else 2, 8)
    wanted = torch.logspace(10, 4, 8, base=2, dtype=torch.float64)
    torch.testing.assert_close(lives, wanted.expand_as(lives), rtol=1e-6, atol=0)


def test_decays_have_the_floor_that_is_asked_for():
    gate = make({**MIXER, "gate": {**GATE, "lowest": -2.0}}, SHAPE, torch.float64).recurrent.gate
    torch.nn.init.constant_(gate.logits.base, 1e4)
    x = Draw.of(SHAPE, 5, torch.float64)
    torch.testing.assert_close(gate(x.hidden, x.k), torch.full((2, 5, 2, 8), -2.0, dtype=torch.float64))


@pytest.mark.parametrize("bias", [0.0, 3.0])
def test_output_starts_at_the_size_that_is_asked_for(bias):
    output = build(
        {**MIXER, "output": {"name": "gated_norm", "rank": 3, "start": 0.1, "bias": bias}}, SHAPE
    ).output
    x = Draw.of(SHAPE, 9, torch.float64)
    made = output.double()(x.q[..., :6], x.hidden)
    rms = made.square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, 0.1), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"fastest": 20.0, "slowest": 10.0}, "mixer.gate.fastest: 20.0 must be at most slowest (10.0)"),
        ({"per": "head"}, "mixer.gate.per: 'head' is not one of kv_head, query_head"),
        ({"lowest": 1.0}, "mixer.gate.lowest: must be at least -1000 and at most 0, got 1.0"),
        (
            {"lowest": -0.01},
            "mixer.gate.lowest: -0.01 is above the log decay of a half-life of 16.0 tokens, -0.0433; lower it, or give "
            "fastest more tokens",
        ),
    ],
)
def test_options_are_checked(options, problem):
    assert problem in check({**MIXER, "gate": {**GATE, **options}})


def test_gdn2_needs_a_gate_by_feature():
    (problem,) = check({**MIXER, "update": {"name": "gdn2"}, "gate": {"name": "mamba2"}})
    assert problem.startswith("mixer.gate: update 'gdn2' takes a gate per feature") and "kda" in problem


def test_recipes_start_at_one_output():
    """gdn2's gates at one half are beta at one half."""
    outs = []
    for name in ("kda", "gdn2"):
        torch.manual_seed(0)
        made = build(compose(name).mixer, SHAPE).double()
        torch.manual_seed(0)
        made.reset_parameters()
        for part in (made.recurrent.gate.logits, made.output.gate):
            torch.nn.init.zeros_(part.up)
        outs.append(Draw.of(SHAPE, 30, torch.float64).run(made.chunked))
    torch.testing.assert_close(*outs, atol=1e-9, rtol=1e-6)


RECORDED = {
    "kda": [
        [-0.015616, 0.014578, -0.240283],
        [0.710036, 0.073738, 0.024662],
        [-0.054268, -0.022514, 0.171656],
        [-0.096630, 0.057426, -0.261323],
        [0.126010, 0.029612, -0.001801],
        [-0.287544, -0.050105, 0.118712],
    ],
    "lowest": [
        [-0.015616, 0.014578, -0.240283],
        [0.696869, 0.077847, 0.000925],
        [-0.052948, -0.022538, 0.177076],
        [-0.107108, 0.056562, -0.261953],
        [0.131080, 0.025298, 0.068003],
        [-0.288767, -0.050098, 0.118111],
    ],
    "gdn2": [
        [-0.018445, 0.015964, -0.231583],
        [0.664882, 0.084393, 0.038699],
        [-0.058498, -0.022608, 0.149588],
        [-0.083257, 0.047576, -0.274470],
        [0.138252, 0.022550, 0.059576],
        [-0.280570, -0.049671, 0.123993],
    ],
}
"""Outputs [T, V] of flash-linear-attention 0.6.0 on the inputs below: the maths of its KimiDeltaAttention (with and
without a lower bound of -5) and GatedDeltaNet2 behind the projections, without convolution, on its plain float32
recurrences (`naive_recurrent_kda`, `naive_recurrent_gdn2`)."""


def wave(seed: int, *size: int) -> torch.Tensor:
    return torch.sin(seed + 0.7 * torch.arange(math.prod(size), dtype=torch.float64)).view(size)


@pytest.mark.parametrize("name", RECORDED)
def test_equals_what_fla_recorded(name):
    shape = LayerShape(heads=1, kv_heads=1, key_dim=4, value_dim=3, scaling=0.5, model_dim=5)
    gate = {"name": "kda", "rank": 2, "lowest": -5.0 if name == "lowest" else 0.0}
    output = {"name": "gated_norm", "rank": 2}
    rule = {"name": "gdn2" if name == "gdn2" else "delta", "scale": 0.5}
    made = build({**MIXER, "gate": gate, "output": output, "update": rule}, shape).double()
    seeds = [
        *((getattr(made.recurrent.gate.logits, n), s) for n, s in (("down", 5), ("up", 6), ("base", 7))),
        (made.recurrent.gate.a_log, 8),
        *((getattr(made.output.gate, n), s) for n, s in (("down", 15), ("up", 16), ("base", 17))),
        (made.output.scale, 18),
    ]
    if name == "gdn2":
        seeds += [(made.update.erase_weight, 11), (made.update.write_weight, 12)]
    else:
        seeds += [(made.update.beta_weight, 9)]
    with torch.no_grad():
        for parameter, seed in seeds:
            parameter.copy_(wave(seed, *parameter.shape))
    q, k, v = (wave(seed, 1, 6, 1, width) for seed, width in ((1, 4), (2, 4), (3, 3)))
    out = made.chunked(q, k, v, hidden=wave(4, 1, 6, 5), plain=(q, k))
    recorded = torch.tensor(RECORDED[name], dtype=torch.float64)
    torch.testing.assert_close(out[0, :, 0], recorded, atol=2e-6, rtol=0)
