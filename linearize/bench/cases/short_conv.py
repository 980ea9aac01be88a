"""The short convolutions of q, k and v: one launch against three, and against torch's conv1d."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.bench.case import Call, Case, Contender, Draw, Tensors
from linearize.bench.peers import fla, ours
from linearize.bench.shapes import Shape, sized

TAPS = 4
STREAMS = ("q", "k", "v")
WEIGHTS = ("q_weight", "k_weight", "v_weight")


def cases(tokens: int, lengths: tuple[int, ...]) -> list[Case]:
    """As many key heads as query heads, and Llama-3-8B's grouped ones."""
    length = 8192 if 8192 in lengths else lengths[-1]
    return [_case(sized(tokens, length, 16, 64)), _case(sized(tokens // 4, length, 32, 128, 8))]


def _case(shape: Shape) -> Case:
    def inputs(draw: Draw) -> Tensors:
        found = shape.qkv(draw)
        for name, weight in zip(STREAMS, WEIGHTS, strict=True):
            found[weight] = draw.normal(found[name].shape[2], shape.dim, TAPS, dtype=torch.float32, scale=0.5)
        return found

    def build(inputs: Tensors) -> Call:
        short_conv_streams = ours("short_conv", "short_conv_streams")
        streams, weights = [inputs[name] for name in STREAMS], [inputs[name] for name in WEIGHTS]
        return lambda: short_conv_streams(streams, weights, silu=True)[0]

    def three_launches(inputs: Tensors) -> Call:
        causal_conv1d = fla("modules.causal_conv1d", "causal_conv1d")

        def call() -> list[Tensor]:
            pairs = zip(STREAMS, WEIGHTS, strict=True)
            flat = [(inputs[name].flatten(2), inputs[weight].flatten(0, 1)) for name, weight in pairs]
            return [causal_conv1d(x, weight.to(x.dtype), activation="silu")[0] for x, weight in flat]

        return call

    def plain(inputs: Tensors) -> Call:
        def call() -> list[Tensor]:
            outputs = []
            for name, weight in zip(STREAMS, WEIGHTS, strict=True):
                x = inputs[name].flatten(2).mT
                kernel = inputs[weight].flatten(0, 1)[:, None].to(x.dtype)
                y = F.conv1d(F.pad(x, (TAPS - 1, 0)), kernel, groups=len(kernel))
                outputs.append(F.silu(y).mT)
            return outputs

        return call

    elements = shape.rows * shape.dim * (1 + 2 * shape.kv_heads / shape.heads)
    return Case(
        "short_conv",
        f"{shape}, {TAPS} taps, SiLU",
        shape.tokens,
        inputs,
        (*STREAMS, *WEIGHTS),
        (4 * elements, 10 * elements),
        (0, 0),
        (
            Contender("linearize, one launch", build, kind="ours"),
            Contender("fla causal_conv1d, three", three_launches, kind="tuned"),
            Contender("torch conv1d, three", plain),
        ),
    )
