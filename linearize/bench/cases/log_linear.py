"""Log-linear attention with a decay per head, over the additive and the delta rule: weights for stretches that double.

Ours is the mixer's rule with the weights given, all levels together, and beside it a call of the rule for each; levels
are those of the paper, one token the shortest stretch, as many as the text has. The peer, of the additive rule alone,
takes the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.bench.case import Call, Case, Contender, Draw, Tensors
from linearize.bench.peers import SOFTMAX, fla
from linearize.bench.shapes import Shape, sized

SOME = (2048, 8192, 32_768)


def cases(tokens: int, lengths: tuple[int, ...]) -> list[Case]:
    """At a few lengths."""
    some = [length for length in lengths if length in SOME] or list(lengths[:1])
    return [
        made
        for length in some
        for made in (_case(sized(tokens, length, 16, 64), delta) for delta in (False, True))
    ]


def _case(shape: Shape, delta: bool) -> Case:
    levels = max(1, math.ceil(math.log2(shape.tokens)))

    def inputs(draw: Draw) -> Tensors:
        found = shape.qkv(draw)
        rows = (shape.batch, shape.tokens, shape.heads)
        found["q"] = found["q"] * shape.dim**-0.5
        found["log_decay"] = F.logsigmoid(draw.normal(*rows, dtype=torch.float32)) / 16
        found["shares"] = F.softplus(draw.normal(*rows, levels + 1, dtype=torch.float32))
        if delta:
            found["k"] = F.normalize(found["k"].float(), dim=-1).to(draw.dtype)
            found["beta"] = draw.normal(*rows, dtype=torch.float32).sigmoid()
        return found | {"docs": draw.documents(shape.batch, shape.tokens)}

    def narrow(inputs: Tensors) -> Tensors:
        # the peer multiplies scores by its weights in their own dtype, and then by values, which have to have the same
        return {**inputs, "shares": inputs["shares"].to(inputs["v"].dtype)}

    def peer(inputs: Tensors) -> Call:
        chunk = fla("ops.log_linear_attn", "chunk_log_linear_attn")
        q, k, v, log_decay, shares = (inputs[name] for name in ("q", "k", "v", "log_decay", "shares"))
        return lambda: chunk(q, k, v, log_decay, shares, scale=1.0)[0]

    # what is written and read of one state, and what is read of each further one
    read = 2 * shape.rows * shape.dim**2
    forward = (2 + levels + delta) * read
    peers = () if delta else (Contender("fla chunk_log_linear_attn", peer, kind="tuned", layout=narrow),)
    return Case(
        "log_linear_delta" if delta else "log_linear",
        f"{shape}, decay per head, {levels + 1} levels",
        shape.tokens,
        inputs,
        ("q", "k", "v", "log_decay", "shares", *(("beta",) if delta else ())),
        shape.bytes(extra=4 * (levels + 2 + delta)),
        (forward, forward + 2 * forward + 2 * read),
        (
            Contender("linearize", _ours(shape, levels, delta), kind="ours"),
            Contender("linearize, a call for each level", _ours(shape, levels, delta, joined=False)),
            *peers,
            *SOFTMAX,
        ),
        swept=True,
    )


def _ours(shape: Shape, levels: int, delta: bool, *, joined: bool = True) -> Callable[[Tensors], Call]:
    """The rule on levels, its weights and strengths taken from the inputs."""

    def build(inputs: Tensors) -> Call:
        from linearize.mixers import LayerShape, State
        from linearize.mixers.update import Stream
        from linearize.mixers.update.log_linear import LogLinear
        from linearize.mixers.update.log_linear_delta import LogLinearDelta

        class Given:
            def level_shares(self, stream: Stream) -> Tensor:
                return F.pad(inputs["shares"], (0, 1))  # nothing is older than all levels

        class Additive(Given, LogLinear):
            pass

        class Delta(Given, LogLinearDelta):
            def _terms(self, stream: Stream) -> tuple[Stream, Tensor, Tensor, Tensor]:
                return stream, stream.q, stream.k, inputs["beta"]

        heads, dim = shape.heads, shape.dim
        layer = LayerShape(heads, heads, dim, dim, 1.0, model_dim=1)
        kind: Any = Delta if delta else Additive
        rule = kind(kind.Config(levels=levels), heads, dim, dim, layer, running_sum=False)
        rule.decay, rule.joined = "head", joined
        q, k, v, log_decay, docs = (inputs[name] for name in ("q", "k", "v", "log_decay", "docs"))
        valid = torch.ones_like(docs, dtype=torch.bool)
        stream = Stream(q, k, v, docs, valid, log_decay, dtype=q.dtype, fresh=True)

        def call() -> Tensor:
            state: Any = State(rule.initial(len(q), torch.float32, q.device))
            made: Tensor = rule.chunked(stream, state).numerator
            return made

        return call

    return build
