"""Other libraries' models as loops in float64, from their equations, on what an export wrote; no code of ours.

fla 0.6's `gla`, `delta_net`, `gated_deltanet` and `transformer` from config.json and safetensors, llama.cpp's `arwkv7`
and `rwkv6qwen2` from a GGUF file: one sequence, token by token, head by head.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F


def rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def silu(x: Tensor) -> Tensor:
    return x * x.sigmoid()


class Tensors:
    """Tensors by name, float64."""

    def __init__(self, tensors: dict[str, Tensor], prefix: str = "") -> None:
        self.tensors, self.prefix = tensors, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name].double()

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.tensors

    def under(self, prefix: str) -> Tensors:
        return Tensors(self.tensors, self.prefix + prefix)


def fla_logits(folder: Path, ids: Tensor) -> Tensor:
    """ids [T] -> logits [T, V] of a folder in fla's layout."""
    config = json.loads((folder / "config.json").read_text())
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    known, eps = Tensors(tensors), config["norm_eps"]
    layer = {"gla": gla, "delta_net": delta, "gated_deltanet": delta, "transformer": None}[
        config["model_type"]
    ]
    whole = config if config["model_type"] == "transformer" else None
    x = known["model.embeddings.weight"][ids]
    for index in range(config["num_hidden_layers"]):
        own = known.under(f"model.layers.{index}.")
        soft = whole or next((e for e in config.get("attn") or [] if index in e["layers"]), None)
        seen = rms(x, eps) * own["attn_norm.weight"]
        attn = own.under("attn.")
        x = x + (attention(seen, attn, soft) if soft else layer(seen, attn, config))
        seen = rms(x, eps) * own["mlp_norm.weight"]
        gate, up = seen @ own["mlp.gate_proj.weight"].T, seen @ own["mlp.up_proj.weight"].T
        x = x + (silu(gate) * up) @ own["mlp.down_proj.weight"].T
    head = "model.embeddings.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return (rms(x, eps) * known["model.norm.weight"]) @ known[head].T


def attention(x: Tensor, own: Tensors, entry: dict[str, Any]) -> Tensor:
    """fla's softmax layer under rotary positions, over the last `window_size` tokens."""
    heads, groups = entry["num_heads"], entry["num_heads"] // entry["num_kv_heads"]
    made = {}
    for role in "qkv":
        made[role] = x @ own[f"{role}_proj.weight"].T
        if entry["qkv_bias"]:
            made[role] = made[role] + own[f"{role}_proj.bias"]
    dim, tokens = x.shape[1] // heads, len(x)
    half = dim // 2
    frequency = entry["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
    outputs = []
    for head in range(heads):
        q, k, v = (
            made[role][:, place * dim : (place + 1) * dim]
            for role, place in (("q", head), ("k", head // groups), ("v", head // groups))
        )
        turned = []
        for y in (q, k):
            angle = torch.arange(tokens, dtype=torch.float64)[:, None] * frequency
            near, far = y[:, :half], y[:, half:]
            turned.append(
                torch.cat(
                    [near * angle.cos() - far * angle.sin(), far * angle.cos() + near * angle.sin()], -1
                )
            )
        rows = []
        for t in range(tokens):
            first = max(0, t + 1 - (entry["window_size"] or tokens))
            scores = turned[1][first : t + 1] @ turned[0][t] / math.sqrt(dim)
            rows.append(scores.softmax(0) @ v[first : t + 1])
        outputs.append(torch.stack(rows))
    return torch.cat(outputs, -1) @ own["o_proj.weight"].T


def gla(x: Tensor, own: Tensors, config: dict[str, Any]) -> Tensor:
    """Yang et al. 2023, equation 3, with fla's low-rank gate and the norm of each head."""
    heads, groups = config["num_heads"], config["num_heads"] // config["num_kv_heads"]
    assert not config["use_short_conv"] and not config["use_output_gate"]
    width = round(config["hidden_size"] * config["expand_k"]) // heads
    values = round(config["hidden_size"] * config["expand_v"]) // heads
    q, k, v = (x @ own[f"{role}_proj.weight"].T for role in "qkv")
    if config["feature_map"] == "relu":
        q, k = q.relu(), k.relu()
    logits = x @ own["gk_proj.0.weight"].T @ own["gk_proj.1.weight"].T + own["gk_proj.1.bias"]
    decay = logits.sigmoid() ** (1 / 16)
    outputs = torch.zeros(len(x), heads, values, dtype=torch.float64)
    for head in range(heads):
        shared = slice(head // groups * width, (head // groups + 1) * width)
        state = torch.zeros(width, values, dtype=torch.float64)
        for t in range(len(x)):
            value = v[t, head // groups * values : (head // groups + 1) * values]
            state = decay[t, shared, None] * state + k[t, shared, None] * value
            outputs[t, head] = q[t, head * width : (head + 1) * width] @ state / math.sqrt(width)
    normed = rms(outputs, config["norm_eps"]) * own["g_norm.weight"]
    return normed.flatten(1) @ own["o_proj.weight"].T


def delta(x: Tensor, own: Tensors, config: dict[str, Any]) -> Tensor:
    """Yang et al. 2024 (2406.06484, equation 4; 2412.06464, equation 10), behind convolutions with SiLU."""
    heads, gated = config["num_heads"], config["model_type"] == "gated_deltanet"
    assert config["use_short_conv"] and not config["use_gate"] and not config["allow_neg_eigval"]
    made = {}
    for role in "qkv":
        y, filters = x @ own[f"{role}_proj.weight"].T, own[f"{role}_conv1d.weight"][:, 0]
        taps = filters.shape[1]
        behind = F.pad(y, (0, 0, taps - 1, 0))
        made[role] = silu(
            torch.stack([(behind[t : t + taps] * filters.T).sum(0) for t in range(len(x))])
        ).unflatten(1, (heads, -1))
    beta = (x @ own["b_proj.weight"].T).sigmoid()
    decay = torch.ones(len(x), heads, dtype=torch.float64)
    if gated:
        decay = (-own["A_log"].exp() * F.softplus(x @ own["a_proj.weight"].T + own["dt_bias"])).exp()
    width, values = made["q"].shape[2], made["v"].shape[2]
    outputs = torch.zeros(len(x), heads, values, dtype=torch.float64)
    for head in range(heads):
        state = torch.zeros(width, values, dtype=torch.float64)
        for t in range(len(x)):
            q, k, v = (made[role][t, head] for role in "qkv")
            q, k = (y / (y.square().sum() + 1e-6).sqrt() for y in (q, k))
            state = decay[t, head] * state
            state = state + beta[t, head] * torch.outer(k, v - k @ state)
            outputs[t, head] = q @ state / math.sqrt(width)
    normed = rms(outputs, config["norm_eps"]) * own["o_norm.weight"]
    return normed.flatten(1) @ own["o_proj.weight"].T


def gguf_logits(file: Path, ids: Tensor) -> Tensor:
    """ids [T] -> logits [T, V] of a GGUF file of llama.cpp's arwkv7 or rwkv6qwen2."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(file)
    said = {key: field.contents() for key, field in reader.fields.items() if "tokens" not in key}
    tensors = {}
    for one in reader.tensors:
        plain = torch.from_numpy(dequantize(one.data, one.tensor_type).copy())
        tensors[one.name] = plain.reshape([int(n) for n in reversed(one.shape)])
    known, arch = Tensors(tensors), said["general.architecture"]
    eps = said[f"{arch}.attention.layer_norm_rms_epsilon"]
    mixing = {"arwkv7": arwkv7, "rwkv6qwen2": rwkv6}[arch]
    x, first = known["token_embd.weight"][ids], []
    for index in range(said[f"{arch}.block_count"]):
        own = known.under(f"blk.{index}.")
        x = x + mixing(rms(x, eps) * own["attn_norm.weight"], own, said, first)
        seen = rms(x, eps) * own["ffn_norm.weight"]
        x = (
            x
            + (silu(seen @ own["ffn_gate.weight"].T) * (seen @ own["ffn_up.weight"].T))
            @ own["ffn_down.weight"].T
        )
    return (rms(x, eps) * known["output_norm.weight"]) @ known["output.weight"].T


def arwkv7(x: Tensor, own: Tensors, said: dict[str, Any], first: list[Tensor]) -> Tensor:
    """RWKV-7's time mixing (2503.14456, section 3), each value mixed with the first layer's."""
    size = said["arwkv7.wkv.head_size"]
    heads = x.shape[1] // size
    behind = F.pad(x, (0, 0, 1, 0))[:-1] - x
    mixed = [x + behind * lerp for lerp in own["time_mix_lerp_fused.weight"][:, 0, 0]]

    def low(y: Tensor, name: str, bend: Any = lambda z: z) -> Tensor:
        return bend(y @ own[f"time_mix_{name}1.weight"].T) @ own[f"time_mix_{name}2.weight"].T

    decay = (-0.606531 * (low(mixed[1], "w", torch.tanh) + own["time_mix_w0.weight"]).sigmoid()).exp()
    rate = (low(mixed[4], "a") + own["time_mix_a0.weight"]).sigmoid()
    r = mixed[0] @ own["time_mix_receptance.weight"].T
    k = mixed[2] @ own["time_mix_key.weight"].T
    v = mixed[3] @ own["time_mix_value.weight"].T
    if first:
        v = v + (first[0] - v) * (low(mixed[3], "v") + own["time_mix_v0.weight"]).sigmoid()
    else:
        first.append(v)
    removed = F.normalize((k * own["time_mix_k_k.weight"]).unflatten(1, (heads, size)), dim=-1).flatten(1)
    k = k * (1 + (rate - 1) * own["time_mix_k_a.weight"])
    outputs = torch.zeros_like(x)
    for head in range(heads):
        own_dims = slice(head * size, (head + 1) * size)
        state = torch.zeros(size, size, dtype=torch.float64)
        for t in range(len(x)):
            gone, speed = removed[t, own_dims], rate[t, own_dims]
            taken = gone @ state
            state = decay[t, own_dims, None] * state - torch.outer(gone * speed, taken)
            state = state + torch.outer(k[t, own_dims], v[t, own_dims])
            outputs[t, own_dims] = r[t, own_dims] @ state
    if "time_mix_ln.weight" in own:
        parted = outputs.unflatten(1, (heads, size))
        parted = rms(parted - parted.mean(-1, keepdim=True), 64e-5)
        outputs = parted.flatten(1) * own["time_mix_ln.weight"] + own["time_mix_ln.bias"]
    bonus = (k * r * own["time_mix_r_k.weight"]).unflatten(1, (heads, size)).sum(-1, keepdim=True)
    outputs = outputs + (bonus * v.unflatten(1, (heads, size))).flatten(1)
    if "time_mix_g1.weight" in own:
        outputs = outputs * low(mixed[5], "g", torch.sigmoid)
    return outputs @ own["time_mix_output.weight"].T


def rwkv6(x: Tensor, own: Tensors, said: dict[str, Any], first: list[Tensor]) -> Tensor:
    """RADLADS' RWKV-6: keys times one minus their decay, a sigmoid gate, key-value heads shared in groups."""
    size, heads = said["rwkv6qwen2.wkv.head_size"], x.shape[1] // said["rwkv6qwen2.wkv.head_size"]
    groups = heads // said["rwkv6qwen2.attention.head_count_kv"]
    behind = F.pad(x, (0, 0, 1, 0))[:-1] - x
    seen = (x + behind * own["time_mix_lerp_x.weight"].flatten()) @ own["time_mix_w1.weight"].T
    five = torch.einsum("tfe,fde->ftd", seen.tanh().unflatten(1, (5, -1)), own["time_mix_w2.weight"])
    lerp = own["time_mix_lerp_fused.weight"][:, 0]
    xw, xk, xv, xr, xg = (x + behind * (one + more) for one, more in zip(lerp, five, strict=True))
    made = {}
    for name, y in (("receptance", xr), ("key", xk), ("value", xv)):
        made[name] = y @ own[f"time_mix_{name}.weight"].T
        if f"time_mix_{name}.bias" in own:
            made[name] = made[name] + own[f"time_mix_{name}.bias"]
    narrow = (xw @ own["time_mix_decay_w1.weight"].T).tanh()
    decay = (-(narrow @ own["time_mix_decay_w2.weight"].T + own["time_mix_decay.weight"]).exp()).exp()
    outputs = torch.zeros_like(x)
    for head in range(heads):
        own_dims = slice(head * size, (head + 1) * size)
        shared = slice(head // groups * size, (head // groups + 1) * size)
        state = torch.zeros(size, size, dtype=torch.float64)
        for t in range(len(x)):
            w = decay[t, own_dims]
            written = made["key"][t, shared] * (1 - w)
            state = w[:, None] * state + torch.outer(written, made["value"][t, shared])
            outputs[t, own_dims] = made["receptance"][t, own_dims] @ state / math.sqrt(size)
    return (outputs * (xg @ own["time_mix_gate.weight"].T).sigmoid()) @ own["time_mix_output.weight"].T
