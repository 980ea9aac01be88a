"""fla's softmax layers, which stand between the others of a hybrid (`attn` in a config), or make up a `transformer`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from linearize.export.layouts.body import Body
from linearize.export.layouts.difference import Difference, Section, said
from linearize.export.layouts.layer import ForeignLayer, Given
from linearize.mixers import LayerShape


class Transformer(ForeignLayer):
    """fla's model of softmax layers alone; what differs in a mixer is `attention_differences`' to say."""

    name = "transformer"
    model = "transformer"


def attention_differences(given: Given, body: Body) -> Iterator[Difference]:
    """What keeps a mixer without a recurrent branch from being softmax under RoPE, over all tokens or the last ones."""
    mixer, window = given.mixer, given.mixer["window"]
    if window["name"] not in ("full", "sliding") or said_more(mixer):
        yield Difference("window", said(mixer, "window"), "full, or sliding without pinned tokens and sinks")
    if mixer["output"]["name"] != "none":
        yield Difference("output", said(mixer, "output"), "none")
    if not mixer["position"]["window"]:
        yield Difference("position", "no RoPE in the window", "RoPE")
    yield from softmax_differences(given.shape, body)


def said_more(mixer: Section) -> bool:
    """Whether a window does more than slide."""
    options = {key: value for key, value in mixer["window"].items() if key not in ("name", "size")}
    usual = {"first": 0, "sinks": "none", "log_base": 0}
    return any(value != usual.get(key, value) for key, value in options.items())


def softmax_differences(shape: LayerShape, body: Body) -> Iterator[Difference]:
    """What keeps a teacher's own softmax layer from being fla's."""
    if body.rope is None:
        yield Difference("body", f"rotary positions of type {body.rope_type}", "one base (rope_theta) alone")
    if shape.rotary != "half":
        yield Difference("body", "a softmax layer without RoPE", "RoPE in every one")
    if shape.heads * shape.key_dim != body.hidden:
        ours = f"{shape.heads} heads of {shape.key_dim} in a width of {body.hidden}"
        yield Difference("body", ours, "heads that fill the width")
    if abs(shape.scaling * shape.key_dim**0.5 - 1) > 1e-6 or shape.softcap or shape.chunk:
        yield Difference("body", "scores scaled, capped or cut into chunks", "scores / sqrt(K)")


def attention_entry(shape: LayerShape, body: Body, window: int | None, biased: bool) -> dict[str, Any]:
    """One entry of `attn`, without its layers."""
    limits = [size for size in (window, shape.sliding_window) if size]
    return {
        "num_heads": shape.heads,
        "num_kv_heads": shape.kv_heads,
        "qkv_bias": biased,
        "window_size": min(limits) if limits else None,
        "rope_theta": body.rope,
    }
