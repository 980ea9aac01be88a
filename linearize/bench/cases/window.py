"""The window alone: softmax over the last keys, beside compiled flex_attention with the same mask."""

from __future__ import annotations

import torch

from linearize.bench.case import Call, Case, Contender, Draw, NotAvailable, Tensors
from linearize.bench.peers import SOFTMAX, ours
from linearize.bench.shapes import Shape, attention_flops, sized


def cases(tokens: int, lengths: tuple[int, ...]) -> list[Case]:
    """All tokens as one text, then longer windows and wider heads."""
    length = lengths[-1]
    found = [_case("window", sized(tokens, length, 16, 64), 64)]
    found.append(_case("window_pinned", sized(tokens, length, 16, 64), 64, pins=4))
    found += [_case(f"window_{size}", sized(tokens, length, 16, 64), size) for size in (256, 1024)]
    found.append(_case("window_128_256", sized(tokens, length, 8, 128), 256))
    found.append(_case("window_256_512", sized(tokens, length, 4, 256), 512))
    return found


def _case(name: str, shape: Shape, window: int, pins: int = 0) -> Case:
    def inputs(draw: Draw) -> Tensors:
        return shape.qkv(draw)

    def build(inputs: Tensors) -> Call:
        window_triton, seen = ours("window.operator", "window_triton"), ours("window", "Seen")
        q, k, v = (inputs[part] for part in ("q", "k", "v"))
        pin = first = None
        if pins:
            pin = torch.zeros(1, shape.tokens, dtype=torch.int32, device=q.device)
            first = (torch.arange(shape.tokens, device=q.device) - window + 1).clamp_min(0).int()[None]
        sees = seen(window, 0, first, pin, pins)
        return lambda: window_triton(q, k, v, sees, scaling=shape.dim**-0.5)[0]

    def flex(inputs: Tensors) -> Call:
        try:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        except ImportError as error:
            raise NotAvailable(f"this torch has no flex_attention: {error}") from error

        def seen(b: object, h: object, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return (q >= k) & ((q - k < window) | (k < pins))

        device = inputs["q"].device
        mask = create_block_mask(seen, None, None, shape.tokens, shape.tokens, device=device, _compile=True)
        compiled = torch.compile(flex_attention, dynamic=False)
        q, k, v = (inputs[part] for part in ("q", "k", "v"))
        return lambda: compiled(q, k, v, block_mask=mask)

    def heads_first(inputs: Tensors) -> Tensors:
        return {part: inputs[part].transpose(1, 2).contiguous() for part in ("q", "k", "v")}

    return Case(
        name,
        f"{shape} window {window}" + (f" + {pins} first" if pins else ""),
        shape.tokens,
        inputs,
        ("q", "k", "v"),
        shape.bytes(extra=0),
        attention_flops(shape, window=window),
        (
            Contender("linearize", build, kind="ours"),
            Contender("flex_attention, compiled", flex, layout=heads_first),
            *(SOFTMAX if name == "window" else ()),
        ),
    )
