"""Gated slots (GSA): two passes with 64 slots, the keys and values of a head in each."""

from __future__ import annotations

import torch

from linearize.bench.case import Call, Case, Contender, Draw, Tensors
from linearize.bench.peers import SOFTMAX, fla, ours
from linearize.bench.shapes import Shape, attention_flops, sized

SOME = (2048, 8192, 32_768)
SLOTS = 64


def cases(tokens: int, lengths: tuple[int, ...]) -> list[Case]:
    """At a few lengths."""
    some = [length for length in lengths if length in SOME] or list(lengths[:1])
    return [_case(sized(tokens, length, 16, 64)) for length in some]


def _case(shape: Shape) -> Case:
    rows = (shape.batch, shape.tokens, shape.heads)

    def inputs(draw: Draw) -> Tensors:
        found = shape.qkv(draw)
        found["q"] = found["q"] * shape.dim**-0.5
        # log sigmoid / 8 as in GSA, so that a slot remembers tens of tokens
        logits = draw.normal(*rows, SLOTS, dtype=torch.float32)
        found["log_decay"] = (torch.nn.functional.logsigmoid(logits) / 8).to(draw.dtype)
        return found

    def build(inputs: Tensors) -> Call:
        slots_chunk = ours("slots", "slots_chunk")
        q, k, v, log_decay = (inputs[name] for name in ("q", "k", "v", "log_decay"))
        size = (len(q), shape.heads)
        state = (
            torch.zeros(*size, shape.dim, SLOTS, device=q.device),
            torch.zeros(*size, SLOTS, shape.dim, device=q.device),
        )
        return lambda: slots_chunk(q, k, v, None, log_decay, None, state)[0]

    def peer(inputs: Tensors) -> Call:
        q, k, v, log_decay = (inputs[name] for name in ("q", "k", "v", "log_decay"))
        chunk = fla("ops.gsa", "chunk_gsa")

        def call() -> torch.Tensor:
            # 1 - a is a part of what is timed, as it is one of ours; as fla's layer has it
            writes = 1 - log_decay.exp()
            return chunk(q, k, v, writes, log_decay, scale=1.0)[0]

        return call

    return Case(
        "slots",
        f"{shape}, {SLOTS} slots, decays in bf16",
        shape.tokens,
        inputs,
        ("q", "k", "v", "log_decay"),
        shape.bytes(extra=2 * SLOTS),
        attention_flops(shape, features=2 * SLOTS),
        (
            Contender("linearize", build, kind="ours"),
            Contender("fla chunk_gsa", peer, kind="tuned"),
            *SOFTMAX,
        ),
        swept=True,
    )
