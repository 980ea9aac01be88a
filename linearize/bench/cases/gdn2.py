"""Gated DeltaNet-2: the delta rule with a decay and an erase gate per key dim and a write gate per value dim.

Ours is `generalized_delta` with the products that the mixer makes of the gates; the peer's kernel makes them itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from linearize.bench.case import Call, Case, Contender, Draw, Tensors
from linearize.bench.peers import SOFTMAX, fla, ours
from linearize.bench.shapes import Shape, sized

SOME = (2048, 8192, 32_768)
MILD = 16.0
"""Divisor of log sigmoid: a state that remembers tens of tokens."""
TRAINED = ("q", "k", "v", "erase", "write", "log_decay")


def cases(tokens: int, lengths: tuple[int, ...]) -> list[Case]:
    """At a few lengths."""
    some = [length for length in lengths if length in SOME] or list(lengths[:1])
    return [_case(sized(tokens, length, 16, 64)) for length in some]


def _case(shape: Shape) -> Case:
    def inputs(draw: Draw) -> Tensors:
        found = shape.qkv(draw)
        size = (shape.batch, shape.tokens, shape.kv_heads, shape.dim)
        found["q"] = F.normalize(found["q"].float(), dim=-1).mul(shape.dim**-0.5).to(draw.dtype)
        found["k"] = F.normalize(found["k"].float(), dim=-1).to(draw.dtype)
        for name in ("erase", "write"):
            found[name] = draw.normal(*size, dtype=torch.float32).sigmoid().to(draw.dtype)
        logits = draw.normal(*size, dtype=torch.float32)
        found["log_decay"] = (F.logsigmoid(logits) / MILD).to(draw.dtype)
        return found | {"docs": draw.documents(shape.batch, shape.tokens)}

    def build(inputs: Tensors) -> Call:
        chunk = ours("generalized_delta", "generalized_delta_chunk")
        q, k, v, erase, write, log_decay = (inputs[name] for name in TRAINED)
        start = torch.zeros(len(q), shape.kv_heads, shape.dim, shape.dim, device=q.device)

        def call() -> torch.Tensor:
            erased = k * erase * log_decay.exp()
            return chunk(q, k, v * write, erased, -k, log_decay, inputs["docs"], start)[0]

        return call

    def peer(inputs: Tensors) -> Call:
        chunk = fla("ops.gdn2", "chunk_gdn2")
        q, k, v, erase, write, log_decay = (inputs[name] for name in TRAINED)
        return lambda: chunk(q, k, v, log_decay, erase, write, scale=1.0)[0]

    # read, update, and what the state holds under a key: 2 D D each; backward twice that, and the state again
    forward = 6 * shape.rows * shape.dim**2
    return Case(
        "gdn2",
        f"{shape}, gates per dimension, bf16",
        shape.tokens,
        inputs,
        TRAINED,
        shape.bytes(extra=3 * 2 * shape.dim),
        (forward, forward + 2 * forward + 4 * shape.rows * shape.dim**2),
        (
            Contender("linearize", build, kind="ours"),
            Contender("fla chunk_gdn2", peer, kind="tuned"),
            *SOFTMAX,
        ),
        swept=True,
    )
