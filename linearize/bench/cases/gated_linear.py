"""Gated linear attention: decay per dimension (GLA) and per head (simple GLA, Mamba-2), without a normalizer."""

from __future__ import annotations

import torch

from linearize.bench.case import Call, Case, Contender, Draw, Tensors
from linearize.bench.peers import SOFTMAX, fla, ours
from linearize.bench.shapes import Shape, attention_flops, sized

SOME = (2048, 8192, 32_768)


def cases(tokens: int, lengths: tuple[int, ...]) -> list[Case]:
    """Both decays at a few lengths."""
    some = [length for length in lengths if length in SOME] or list(lengths[:1])
    shapes = [sized(tokens, length, 16, 64) for length in some]
    return [_case("gated_linear", shape, True) for shape in shapes] + [
        _case("gated_linear_per_head", shape, False) for shape in shapes
    ]


def _case(operator: str, shape: Shape, per_dimension: bool) -> Case:
    def inputs(draw: Draw) -> Tensors:
        found = shape.qkv(draw)
        found["q"] = found["q"] * shape.dim**-0.5
        rows = (shape.batch, shape.tokens, shape.heads)
        # log sigmoid / 16 as in GLA, so that a state remembers tens of tokens
        logits = draw.normal(*rows, *([shape.dim] if per_dimension else []), dtype=torch.float32)
        decay = torch.nn.functional.logsigmoid(logits) / 16
        found["log_decay"] = decay.to(draw.dtype) if per_dimension else decay
        return found

    def build(inputs: Tensors) -> Call:
        gated_linear_chunk = ours("gated_linear", "gated_linear_chunk")
        q, k, v, log_decay = (inputs[name] for name in ("q", "k", "v", "log_decay"))
        return lambda: gated_linear_chunk(q, k, v, log_decay, None, None, normalize=False)[0]

    def peer(inputs: Tensors) -> Call:
        q, k, v, log_decay = (inputs[name] for name in ("q", "k", "v", "log_decay"))
        chunk = fla("ops.gla", "chunk_gla") if per_dimension else fla("ops.simple_gla", "chunk_simple_gla")
        return lambda: chunk(q, k, v, log_decay, scale=1.0)[0]

    return Case(
        operator,
        f"{shape}, decay per {'dimension, bf16' if per_dimension else 'head, float32'}",
        shape.tokens,
        inputs,
        ("q", "k", "v", "log_decay"),
        shape.bytes(extra=2 * shape.dim if per_dimension else 4),
        attention_flops(shape, features=shape.dim),
        (
            Contender("linearize", build, kind="ours"),
            Contender("fla chunk_gla" if per_dimension else "fla chunk_simple_gla", peer, kind="tuned"),
            *SOFTMAX,
        ),
        swept=True,
    )
