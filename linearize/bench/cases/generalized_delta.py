"""The generalized delta rule of RWKV-7: a decay by dimension, and a direction of the state moved into another."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from linearize.bench.case import Call, Case, Contender, Draw, Tensors
from linearize.bench.peers import SOFTMAX, fla, ours
from linearize.bench.shapes import Shape, sized

SOME = (2048, 8192, 32_768)
STRONGEST = -math.exp(-0.5)
"""RWKV-7's log decays are this times a sigmoid."""


def cases(tokens: int, lengths: tuple[int, ...]) -> list[Case]:
    """At a few lengths."""
    some = [length for length in lengths if length in SOME] or list(lengths[:1])
    return [_case(sized(tokens, length, 16, 64)) for length in some]


def _case(shape: Shape) -> Case:
    def inputs(draw: Draw) -> Tensors:
        found = shape.qkv(draw)
        size = (shape.batch, shape.tokens, shape.kv_heads, shape.dim)
        found["q"] = found["q"] * shape.dim**-0.5
        kappa = F.normalize(draw.normal(*size, dtype=torch.float32), dim=-1)
        found["a"] = (-kappa).to(draw.dtype)
        found["b"] = (kappa * draw.normal(*size, dtype=torch.float32).sigmoid()).to(draw.dtype)
        found["log_decay"] = (STRONGEST * draw.normal(*size, dtype=torch.float32).sigmoid()).to(draw.dtype)
        return found | {"docs": draw.documents(shape.batch, shape.tokens)}

    def build(inputs: Tensors) -> Call:
        chunk = ours("generalized_delta", "generalized_delta_chunk")
        q, k, v, a, b, log_decay = (inputs[name] for name in ("q", "k", "v", "a", "b", "log_decay"))
        start = torch.zeros(len(q), shape.kv_heads, shape.dim, shape.dim, device=q.device)
        return lambda: chunk(q, k, v, a, b, log_decay, inputs["docs"], start)[0]

    def peer(**options: Any) -> Any:
        def build_peer(inputs: Tensors) -> Call:
            chunk = fla("ops.rwkv7", "chunk_rwkv7")
            q, k, v, a, b, log_decay = (inputs[name] for name in ("q", "k", "v", "a", "b", "log_decay"))
            return lambda: chunk(q, log_decay, k, v, a, b, scale=1.0, **options)[0]

        return build_peer

    # read, update, what the state holds under a, and its move: 2 D D each; backward twice that, and the state again
    forward = 8 * shape.rows * shape.dim**2
    return Case(
        "generalized_delta",
        f"{shape}, decay per dimension, bf16",
        shape.tokens,
        inputs,
        ("q", "k", "v", "a", "b", "log_decay"),
        shape.bytes(extra=3 * 2 * shape.dim),
        (forward, forward + 2 * forward + 6 * shape.rows * shape.dim**2),
        (
            Contender("linearize", build, kind="ours"),
            Contender("fla chunk_rwkv7", peer(), kind="tuned"),
            # the caller's word on the strongest decay, with which fla takes chunks of 64 and tensor cores within them
            Contender("fla chunk_rwkv7, bounded decays", peer(lower_bound=STRONGEST), kind="tuned"),
            *SOFTMAX,
        ),
        swept=True,
    )
