"""A learned state that every text begins with, against loops that begin with it, and where it may not reach."""

from __future__ import annotations

import pytest
import torch
from compositions import SHAPES, Draw, make
from kernel_calls import INTERPRETED, TOLERANCE
from torch.nn import functional as F

from linearize.kernels import dispatch
from linearize.mixers import build

SHAPE = SHAPES["grouped"]
LIMIT = 2 * TOLERANCE[torch.float32]
DELTA = {"feature_map": {"name": "identity"}, "normalizer": {"name": "none"}}
RULES = {
    "delta": {**DELTA, "update": {"name": "delta", "start": True}},
    "delta mamba2": {**DELTA, "gate": {"name": "mamba2"}, "update": {"name": "delta", "start": True}},
    "delta kda": {**DELTA, "gate": {"name": "kda", "rank": 3}, "update": {"name": "delta", "start": True}},
    "additive": {"feature_map": {"name": "elu"}, "update": {"name": "additive", "start": True}},
    "additive scalar": {
        "feature_map": {"name": "elu"},
        "gate": {"name": "scalar"},
        "update": {"name": "additive", "start": True},
    },
    "additive per feature": {
        "feature_map": {"name": "elu"},
        "gate": {"name": "low_rank", "rank": 3},
        "update": {"name": "additive", "start": True},
    },
    "gdn2": {**DELTA, "gate": {"name": "kda", "rank": 3}, "update": {"name": "gdn2", "start": True}},
    "rwkv7": {
        **DELTA,
        "gate": {"name": "rwkv7", "rank": 3},
        "update": {"name": "rwkv7", "rank": 3, "start": True},
    },
    "rwkv7 as published": {
        **DELTA,
        "gate": {"name": "rwkv7", "rank": 3},
        "update": {"name": "rwkv7", "rank": 3, "balanced": False, "start": True},
    },
    "rwkv6": {**DELTA, "gate": {"name": "rwkv6", "rank": 3}, "update": {"name": "rwkv6", "start": True}},
    "hgrn2": {**DELTA, "gate": {"name": "low_rank", "rank": 3}, "update": {"name": "hgrn2", "start": True}},
    "mlstm": {
        "feature_map": {"name": "identity"},
        "gate": {"name": "scalar", "per": "kv_head"},
        "update": {"name": "mlstm", "start": True},
        "normalizer": {"name": "bounded"},
    },
    "delta_product": {
        **DELTA,
        "feature_map": {"name": "identity", "l2_normalize": True},
        "gate": {"name": "mamba2"},
        "update": {"name": "delta_product", "rank": 3, "start": True},
    },
    "slots": {
        **DELTA,
        "feature_map": {"name": "softmax_dim"},
        "gate": {"name": "low_rank", "rank": 3},
        "update": {"name": "slots", "slots": 4, "start": True},
    },
}
rules = pytest.mark.parametrize("name", RULES)


def loop(made, x, row, tokens):
    """Some tokens of one row, a document of their own, a head and a token at a time."""
    branch, update = made.recurrent, made.update
    q, k, v = x.q[row, tokens], x.k[row, tokens], x.v[row, tokens]
    hidden, shape = x.hidden[row, tokens], made.shape
    decay = None
    if branch.gate is not None:
        decay = branch.gate(x.hidden, x.k)[row, tokens].exp()
    out = torch.zeros(len(q), shape.heads, shape.value_dim, dtype=torch.float64)
    heads = update.heads
    for head in range(shape.heads):
        m, key_head = head // (shape.heads // heads), head // shape.group
        state = update.learned.sums[m].clone()
        norm = None if update.learned.log_norms is None else update.learned.log_norms[m].exp()
        for t in range(len(q)):
            keep = 1.0
            if decay is not None:
                keep = decay[t, m // (heads // decay.shape[1])]
            state = (keep[:, None] if isinstance(keep, torch.Tensor) and keep.dim() else keep) * state
            if update.name == "delta":
                key = F.normalize(k[t, key_head], dim=0)
                beta = torch.sigmoid(hidden[t] @ update.beta_weight[:, m] + update.beta_bias[m])
                state = state + beta * torch.outer(key, v[t, key_head] - key @ state)
                query = F.normalize(q[t, head], dim=0) * update.scale[head]
                out[t, head] = query @ state
                continue
            if update.name == "delta_product":
                for j in range(update.steps):
                    key, value = k[t, key_head] / k[t, key_head].norm(), v[t, key_head]
                    at = (j - 1) * heads + m
                    if j:
                        more = (
                            update.later.base[at] + (hidden[t] @ update.later.down) @ update.later.up[:, at]
                        )
                        key, value = key + more[: shape.key_dim], value + more[shape.key_dim :]
                        key = key / key.norm()
                    logit = hidden[t] @ update.beta_weight[:, j * heads + m] + update.beta_bias[j, m]
                    state = state + torch.sigmoid(logit) * torch.outer(key, value - key @ state)
                out[t, head] = F.normalize(q[t, head], dim=0) * update.scale[head] @ state
                continue
            if update.name == "gdn2":
                key = F.normalize(k[t, key_head], dim=0)
                erase = torch.sigmoid(hidden[t] @ update.erase_weight[:, m] + update.erase_bias[m])
                write = torch.sigmoid(hidden[t] @ update.write_weight[:, m] + update.write_bias[m])
                state = state - torch.outer(key, (erase * key) @ state)
                state = state + torch.outer(key, write * v[t, key_head])
                out[t, head] = F.normalize(q[t, head], dim=0) * update.scale[head] @ state
                continue
            key, query = (
                feature(y, None)[0, 0]
                for feature, y in (
                    (branch.feature_map.key, k[None, None, t]),
                    (branch.feature_map.query, q[None, None, t]),
                )
            )
            key, query = key[key_head], query[head]
            if update.name == "rwkv7":
                low = update.rate
                rate = torch.sigmoid(hidden[t] @ low.down @ low.up[:, m] + low.base[m])
                if update.config.balanced:
                    removed, written = key / key.norm(), key * (1 - keep + rate)
                else:
                    removed = F.normalize(key * update.removal[m], dim=0)
                    written = key * (1 + (rate - 1) * update.share[m])
                taken = removed @ (state / keep[:, None])  # before it decays
                state = state - torch.outer(rate * removed, taken) + torch.outer(written, v[t, key_head])
                out[t, head] = query * update.scale[head] @ state
                continue
            if update.name == "slots":
                slots = update.learned_keys.sums[m].clone().mT if t == 0 else slots  # noqa: F821
                slots = keep[:, None] * slots + torch.outer(1 - keep, key)
                state = state + torch.outer(1 - keep, v[t, key_head])
                out[t, head] = torch.softmax(slots @ query, 0) @ state
                continue
            if update.name in ("rwkv6", "hgrn2"):
                state = state + torch.outer(
                    (1 - keep) * (key if update.name == "rwkv6" else 1), v[t, key_head]
                )
                out[t, head] = query @ state
                continue
            if update.name == "mlstm":
                logit = hidden[t] @ update.input_weight[:, m] + update.input_bias[m]
                key = key * torch.exp(update.cap * torch.tanh(logit / update.cap))
            state, norm = state + torch.outer(key, v[t, key_head]), keep * norm + key
            total = query @ norm
            out[t, head] = (query @ state) / (total.abs().clamp_min(1.0) if update.name == "mlstm" else total)
    return out


@rules
def test_every_document_begins_with_it(name):
    made, x = make(RULES[name], SHAPE, torch.float64), Draw.of(SHAPE, 75, torch.float64)
    starts = torch.zeros(2, 75, dtype=torch.bool)
    starts[0, [5, 40]] = True
    valid = torch.ones(2, 75, dtype=torch.bool)
    valid[1, :9] = False
    with torch.no_grad():
        out = x.run(made.chunked, starts=starts, valid=valid)
        for row, first, last in ((0, 0, 5), (0, 5, 40), (0, 40, 75), (1, 9, 75)):
            expected = loop(made, x, row, slice(first, last))
            torch.testing.assert_close(out[row, first:last], expected, atol=1e-10, rtol=1e-8)


@rules
def test_it_starts_as_the_rule_without_it(name):
    with_start = RULES[name]
    without = {**with_start, "update": {**with_start["update"], "start": False}}
    with_start = {**with_start, "update": {**with_start["update"]}}
    if with_start["update"]["name"] in ("additive", "mlstm"):
        with_start["update"]["start_weight"] = 1e-12
    outs = []
    for mixer in (with_start, without):
        torch.manual_seed(0)
        outs.append(Draw.of(SHAPE, 40, torch.float64).run(build(mixer, SHAPE).double().chunked))
    torch.testing.assert_close(*outs, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "delta mamba2",
        pytest.param("delta kda", marks=INTERPRETED),
        "additive per feature",
        pytest.param("gdn2", marks=INTERPRETED),
        "rwkv7 as published",
        "slots",
    ],
)
def test_kernels_give_what_the_parts_do(name):
    """Outputs, the carried state and gradients, in Triton's interpreter where there is no GPU."""
    shape = SHAPES["grouped"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = 2 if device == "cuda" else 1  # the interpreter takes them one after the other
    found = {}
    for kind in ("torch", "triton"):
        made = make(RULES[name], shape, torch.float32).to(device)
        x = Draw.of(shape, 70, torch.float32, batch=rows).apply(lambda y: y.to(device))
        starts = torch.zeros(rows, 70, dtype=torch.bool, device=device)
        starts[0, [3, 41]] = True
        with dispatch.kernels(kind):
            out = x.run(made.chunked, starts=starts)
            grads = torch.autograd.grad(out.square().sum(), list(made.parameters()), allow_unused=True)
            state = made.initial_state(rows, torch.float32, torch.device(device))
            with torch.no_grad():
                x.run(made.chunked, starts=starts, state=state)
                step = Draw.of(shape, 1, torch.float32, batch=rows, seed=3).apply(lambda y: y.to(device))
                after = step.run(made.step, state=state)
        found[kind] = [out, after, state["since"], *grads]
    for one, two in zip(*found.values(), strict=True):
        scale = max(1.0, two.abs().max().item())
        torch.testing.assert_close(one, two, atol=LIMIT * scale, rtol=0)


def test_what_it_adds_no_fused_kernel_computes():
    plain = {"feature_map": {"name": "hedgehog", "dim": 16}, "window": {"name": "sliding", "size": 16}}
    shape = SHAPES["grouped"]
    assert build(plain, shape).fused is not None
    assert build({**plain, "update": {"name": "additive", "start": True}}, shape).fused is None
