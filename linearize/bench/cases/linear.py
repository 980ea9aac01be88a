"""Plain linear attention on q and k as they are: no feature map, no normalizer."""

from __future__ import annotations

from linearize.bench.case import Call, Case, Contender, Draw, Tensors
from linearize.bench.peers import SOFTMAX, linear, ours
from linearize.bench.shapes import Shape, attention_flops, sized


def cases(tokens: int, lengths: tuple[int, ...]) -> list[Case]:
    """2 x 16,384 x 16 x 128, the shape that Helion's figures are for, and 64-dimensional heads at one length."""
    longest = min(16_384, lengths[-1])
    usual = 8192 if 8192 in lengths else longest
    return [_case(sized(tokens // 2, longest, 16, 128)), _case(sized(tokens, usual, 16, 64))]


def _case(shape: Shape) -> Case:
    def inputs(draw: Draw) -> Tensors:
        found = shape.qkv(draw)
        return found | {"q": found["q"] * shape.dim**-0.5}

    def build(inputs: Tensors) -> Call:
        gated_linear_chunk = ours("gated_linear", "gated_linear_chunk")
        q, k, v = (inputs[name] for name in ("q", "k", "v"))
        return lambda: gated_linear_chunk(q, k, v, None, None, None, normalize=False)[0]

    return Case(
        "linear",
        f"{shape}, no features",
        shape.tokens,
        inputs,
        ("q", "k", "v"),
        shape.bytes(),
        attention_flops(shape, features=shape.dim),
        (
            Contender("linearize", build, kind="ours"),
            Contender("fla linear", linear(normalize=False), kind="tuned"),
            *SOFTMAX,
        ),
    )
