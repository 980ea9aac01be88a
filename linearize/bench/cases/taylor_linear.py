"""Second-order Taylor features of 16-wide queries and keys (Based), under their running sum."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from linearize.bench.case import Call, Case, Contender, Draw, Tensors, traffic
from linearize.bench.peers import fla, ours
from linearize.bench.shapes import Shape, attention_flops, sized

SOME = (1024, 8192, 32_768)
DIM = 16
FEATURES = 153


def cases(tokens: int, lengths: tuple[int, ...]) -> list[Case]:
    """At a few lengths."""
    some = [length for length in lengths if length in SOME] or list(lengths[:1])
    return [_case(sized(tokens, length, 16, 64)) for length in some]


def _case(shape: Shape) -> Case:
    def inputs(draw: Draw) -> Tensors:
        rows = (shape.batch, shape.tokens, shape.heads)
        found = {name: draw.normal(*rows, DIM) for name in ("q", "k")}
        return found | {"v": draw.normal(*rows, shape.dim)}

    def build(inputs: Tensors) -> Call:
        taylor_linear_chunk = ours("taylor_linear", "taylor_linear_chunk")
        q, k, v = (inputs[name] for name in ("q", "k", "v"))

        def call() -> Tensor:
            out, total, _ = taylor_linear_chunk(q, k, v, DIM**-0.5)
            return (out / total[..., None]).to(v.dtype)

        return call

    def peer(name: str) -> Callable[[Tensors], Call]:
        def build(inputs: Tensors) -> Call:
            module = {"fused_chunk_based": "fused_chunk", "parallel_based": "parallel"}[name]
            based = fla(f"ops.based.{module}", name)
            q, k, v = (inputs[name] for name in ("q", "k", "v"))
            return lambda: based(q, k, v, DIM**-0.5, True)

        return build

    row = 2 * (2 * DIM + shape.dim)
    return Case(
        "taylor_linear",
        f"{shape}, q and k of {DIM}",
        shape.tokens,
        inputs,
        ("q", "k", "v"),
        traffic(shape.rows * row, shape.rows * 2 * shape.dim),
        attention_flops(shape, features=FEATURES),
        (
            Contender("linearize", build, kind="ours"),
            Contender("fla fused_chunk_based", peer("fused_chunk_based")),
            Contender("fla parallel_based", peer("parallel_based")),
        ),
        swept=True,
    )
