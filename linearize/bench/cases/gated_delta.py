"""The delta rule with a decay per head (Gated DeltaNet)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from linearize.bench.case import Call, Case, Contender, Draw, Tensors
from linearize.bench.peers import SOFTMAX, fla, ours
from linearize.bench.shapes import Shape, sized

SOME = (2048, 8192, 32_768)


def cases(tokens: int, lengths: tuple[int, ...]) -> list[Case]:
    """At a few lengths."""
    some = [length for length in lengths if length in SOME] or list(lengths[:1])
    return [_case(sized(tokens, length, 16, 64)) for length in some]


def _case(shape: Shape) -> Case:
    def inputs(draw: Draw) -> Tensors:
        found = shape.qkv(draw)
        rows = (shape.batch, shape.tokens, shape.heads)
        found["q"] = F.normalize(found["q"].float(), dim=-1).mul(shape.dim**-0.5).to(draw.dtype)
        found["k"] = F.normalize(found["k"].float(), dim=-1).to(draw.dtype)
        found["beta"] = draw.normal(*rows, dtype=torch.float32).sigmoid()
        found["log_decay"] = F.logsigmoid(draw.normal(*rows, dtype=torch.float32)) / 16
        return found | {"docs": draw.documents(shape.batch, shape.tokens)}

    def build(inputs: Tensors) -> Call:
        delta_chunk = ours("gated_delta", "delta_chunk")
        q, k, v, beta, log_decay = (inputs[name] for name in ("q", "k", "v", "beta", "log_decay"))
        start = torch.zeros(len(q), shape.kv_heads, shape.dim, shape.dim, device=q.device)
        return lambda: delta_chunk(q, k, v, beta, log_decay, inputs["docs"], start)[0]

    def peer(inputs: Tensors) -> Call:
        chunk = fla("ops.gated_delta_rule", "chunk_gated_delta_rule")
        q, k, v, beta, log_decay = (inputs[name] for name in ("q", "k", "v", "beta", "log_decay"))
        return lambda: chunk(q, k, v, log_decay, beta, scale=1.0)[0]

    # read, update, and what the state holds under a key: 2 D D each; backward twice that, and the state again
    forward = 6 * shape.rows * shape.dim**2
    return Case(
        "gated_delta",
        f"{shape}, decay per head",
        shape.tokens,
        inputs,
        ("q", "k", "v", "beta", "log_decay"),
        shape.bytes(extra=8),
        (forward, forward + 2 * forward + 4 * shape.rows * shape.dim**2),
        (
            Contender("linearize", build, kind="ours"),
            Contender("fla chunk_gated_delta_rule", peer, kind="tuned"),
            *SOFTMAX,
        ),
        swept=True,
    )
