"""window_linear, the operator of a LoLCATs layer, with and without its window, and in the shapes of larger models."""

from __future__ import annotations

import torch

from linearize.bench.case import Call, Case, Contender, Draw, Tensors
from linearize.bench.peers import SOFTMAX, composed, linear, ours
from linearize.bench.shapes import Shape, attention_flops, sized

WINDOW, MAP_DIM = 64, 64
SOME = (2048, 8192, 32_768)


def cases(tokens: int, lengths: tuple[int, ...]) -> list[Case]:
    """64-dimensional heads over all lengths; the rest at a few."""
    some = [length for length in lengths if length in SOME] or list(lengths[:1])
    found = [_case("window_linear", sized(tokens, length, 16, 64), WINDOW) for length in lengths]
    found += [_case("window_linear_128", sized(tokens, length, 8, 128), WINDOW) for length in some]
    found += [
        _case("window_linear_llama3_8b", sized(tokens // 4, length, 32, 128, 8), WINDOW)
        for length in some[:2]
    ]
    found += [_case("linear_features", sized(tokens, length, 16, 64), 0) for length in some]
    return found


def _case(operator: str, shape: Shape, window: int) -> Case:
    def inputs(draw: Draw) -> Tensors:
        maps = (shape.heads, shape.dim, MAP_DIM)
        found = shape.qkv(draw)
        found["query_map"] = draw.normal(*maps, dtype=torch.float32, scale=shape.dim**-0.5)
        found["key_map"] = draw.normal(*maps, dtype=torch.float32, scale=shape.dim**-0.5)
        if window:
            found["window_weight"] = draw.normal(shape.heads, dtype=torch.float32).sigmoid()
        return found

    def build(inputs: Tensors) -> Call:
        window_linear = ours("window_linear", "window_linear")
        q, k, v, query_map, key_map = (inputs[name] for name in ("q", "k", "v", "query_map", "key_map"))
        weight = inputs.get("window_weight")
        return lambda: window_linear(
            q, k, v, query_map, key_map, window=window, scaling=shape.dim**-0.5, window_weight=weight
        )[0]

    peers = [Contender("torch features, fla linear", composed, kind="tuned", shared=True), *SOFTMAX]
    if not window and shape.heads == shape.kv_heads:
        peers.insert(1, Contender("fla linear, no features", linear(normalize=True), kind="tuned"))
    return Case(
        operator,
        f"{shape} f={MAP_DIM}" + (f" window {window}" if window else ", no window"),
        shape.tokens,
        inputs,
        ("q", "k", "v", "query_map", "key_map", *(["window_weight"] if window else [])),
        shape.bytes(),
        attention_flops(shape, features=2 * MAP_DIM, map_dim=MAP_DIM, window=window),
        (Contender("linearize", build, kind="ours"), *peers),
        remark="fla has no window under the same normalizer: its line has none" if window else "",
        swept=True,
    )
