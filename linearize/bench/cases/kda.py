"""The delta rule with a decay per key dimension (Kimi Delta Attention)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from linearize.bench.case import Call, Case, Contender, Draw, Tensors
from linearize.bench.peers import SOFTMAX, fla, ours
from linearize.bench.shapes import Shape, sized

SOME = (2048, 8192, 32_768)
MILD, STRONG = 16.0, 0.5
"""Divisors of log sigmoid: a state that remembers tens of tokens as in GLA, and one of which chunks must be halved."""


def cases(tokens: int, lengths: tuple[int, ...]) -> list[Case]:
    """Mild decays at a few lengths, heads of 128, and strong decays once."""
    some = [length for length in lengths if length in SOME] or list(lengths[:1])
    middle = some[len(some) // 2]
    return [
        *(_case("kda", sized(tokens, length, 16, 64), MILD) for length in some),
        _case("kda_128", sized(tokens, middle, 8, 128), MILD),
        _case("kda_strong", sized(tokens, middle, 16, 64), STRONG),
    ]


def _case(operator: str, shape: Shape, divisor: float) -> Case:
    def inputs(draw: Draw) -> Tensors:
        found = shape.qkv(draw)
        rows = (shape.batch, shape.tokens, shape.heads)
        found["q"] = F.normalize(found["q"].float(), dim=-1).mul(shape.dim**-0.5).to(draw.dtype)
        found["k"] = F.normalize(found["k"].float(), dim=-1).to(draw.dtype)
        found["beta"] = draw.normal(*rows, dtype=torch.float32).sigmoid()
        logits = draw.normal(*rows, shape.dim, dtype=torch.float32)
        found["log_decay"] = (F.logsigmoid(logits) / divisor).to(draw.dtype)
        return found | {"docs": draw.documents(shape.batch, shape.tokens)}

    def build(inputs: Tensors) -> Call:
        delta_chunk = ours("gated_delta", "delta_chunk")
        q, k, v, beta, log_decay = (inputs[name] for name in ("q", "k", "v", "beta", "log_decay"))
        start = torch.zeros(len(q), shape.kv_heads, shape.dim, shape.dim, device=q.device)
        return lambda: delta_chunk(q, k, v, beta, log_decay, inputs["docs"], start)[0]

    def peer(inputs: Tensors) -> Call:
        chunk = fla("ops.kda", "chunk_kda")
        q, k, v, beta, log_decay = (inputs[name] for name in ("q", "k", "v", "beta", "log_decay"))
        return lambda: chunk(q, k, v, log_decay, beta, scale=1.0)[0]

    # read, update, and what the state holds under a key: 2 D D each; backward twice that, and the state again
    forward = 6 * shape.rows * shape.dim**2
    return Case(
        operator,
        f"{shape}, decay per dimension, bf16",
        shape.tokens,
        inputs,
        ("q", "k", "v", "beta", "log_decay"),
        shape.bytes(extra=2 * shape.dim + 4),
        (forward, forward + 2 * forward + 4 * shape.rows * shape.dim**2),
        (
            Contender("linearize", build, kind="ours"),
            Contender("fla chunk_kda", peer, kind="tuned"),
            *SOFTMAX,
        ),
        swept=operator == "kda",
    )
