"""What the layers of a cache hold of one text, by layer and name, and whether what a file holds could be that."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from linearize.decode.arguments import cache_name, evaluating
from linearize.errors import LinearizeError, UnsupportedModelError
from linearize.mixers.offloaded import device_of
from linearize.mixers.window.full import FullWindow
from linearize.surgery import converted
from linearize.surgery.cache import LinearizedCacheLayer

KEYS = ("keys", "values")
"""What a softmax layer holds, each [1, N, S, K]."""
GROWING = {**dict.fromkeys(KEYS, 2), **dict.fromkeys(("window_k", "window_v", "window_valid"), 1)}
"""Tensors that may grow with the text, and the axis of its tokens; see `growing`."""

COUNTERS = ("position", "seen", "window_since", "window_position")
"""Tensors that count the tokens of a text, every one of them."""
RING = "window_next"
"""The counter of a ring, which begins with its slots."""


def taken(cache: Cache) -> dict[str, Tensor]:
    """Copies of what the layers of a cache of one text hold, "3.sums" being `sums` of layer 3.

    Raises:
        LinearizeError: it holds several texts, or has read padding.
        UnsupportedModelError: a layer holds something else than a mixer's state or keys and values.
    """
    found: dict[str, Tensor] = {}
    layer: Any
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, LinearizedCacheLayer):
            if isinstance(layer, LinearAttentionCacheLayerMixin) or not isinstance(layer, DynamicLayer):
                raise _other(index, layer)
            held = {} if layer.state is None else layer.state.tensors
            read = layer.read
            if read is not None and bool(((read.padding != 0) | (read.texts != read.tokens)).any()):
                raise LinearizeError(
                    "the cache has read padding; a state holds one text without it: read it alone"
                )
        elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            held = {name: getattr(layer, name) for name in KEYS} if layer.is_initialized else {}
        else:
            raise _other(index, layer)
        for name, tensor in held.items():
            if tensor.shape[0] != 1:
                raise LinearizeError(
                    f"the cache holds {tensor.shape[0]} texts, and a state holds one; choose a row with "
                    "cache.batch_select_indices, or read each text alone"
                )
            found[f"{index}.{name}"] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return found


def split(name: str) -> tuple[int, str]:
    """Layer and name of a tensor."""
    index, _, held = name.partition(".")
    return int(index), held


def growing(names: Iterable[str]) -> list[str]:
    """Those of a text's tensors that grow with it.

    A ring has the names of a growing window and one size, and a mixer may call a sum `values`, so a layer is told by
    all that it holds.
    """
    layers: dict[int, set[str]] = {}
    for index, held in map(split, names):
        layers.setdefault(index, set()).add(held)
    return [
        f"{index}.{name}"
        for index, held in layers.items()
        for name in sorted(held & GROWING.keys())
        if (held == set(KEYS) if name in KEYS else RING not in held)
    ]


def check_layout(model: Any, tensors: dict[str, Tensor], tokens: int) -> None:
    """Refuse tensors that the model's layers would not hold after so many tokens; it reads a single one to know.

    A checksum says that a file is as it was written, not that it was written by a model.

    Args:
        model: which is to go on.
        tensors: as of `taken`.
        tokens: of the text.

    Raises:
        LinearizeError: names the first tensor, what it is and what it should be.
    """
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    with torch.no_grad(), evaluating(model):
        one = torch.zeros(1, 1, dtype=torch.int64, device=device_of(model))
        model(input_ids=one, **{cache_name(model): cache, "use_cache": True})
    expected = taken(cache)
    for name in sorted(set(expected) ^ set(tensors)):
        what = "lacks" if name in expected else "holds"
        known = "this model's layers hold" if name in expected else "none of this model's layers holds"
        raise LinearizeError(f"the state {what} '{name[:80]}', which {known}; {REMEDY}")
    reach = {layer.layer_idx: _reach(layer.mixer.window) for layer in converted(model)}
    grows = set(growing(expected))
    for name, like in expected.items():
        index, held = split(name)
        size = list(like.shape)
        if name in grows:
            seen = reach[index] if index in reach else getattr(cache.layers[index], "sliding_window", None)
            size[GROWING[held]] = tokens if not seen or seen == 1 else min(tokens, seen - 1)
        found = tensors[name]
        if list(found.shape) != size or found.dtype != like.dtype:
            raise LinearizeError(
                f"the state's '{name}' is {found.dtype} {list(found.shape)}, and this model holds {like.dtype} {size} "
                f"after {tokens:,} tokens; {REMEDY}"
            )
        _check_counts(name, found, tokens)
    for name in tensors:
        index, held = split(name)
        if held == RING:
            _check_ring(index, tensors, tokens)


def _check_counts(name: str, found: Tensor, tokens: int) -> None:
    """Counters say how long the text is: each of them has to say the same as the file."""
    if found.dtype.is_floating_point or found.dtype == torch.bool or split(name)[1] == RING:
        return
    least, most = _ends(found)
    counted = split(name)[1] in COUNTERS
    if (least, most) != (tokens, tokens) if counted else not 0 <= least <= most <= tokens:
        said = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        raise LinearizeError(
            f"the state's '{name}' counts {said}, and by its description the text has {tokens:,} tokens; {REMEDY}"
        )


def _check_ring(layer: int, tensors: dict[str, Tensor], tokens: int) -> None:
    """A ring fills with the text, until all of its slots but one are taken, and says where the next step writes.

    Kernels do not ask whether that is inside.
    """
    valid, following = tensors[f"{layer}.window_valid"], f"{layer}.{RING}"
    held, slots = int(valid.sum()), valid.numel()
    if not min(tokens, slots - 1) <= held <= tokens:
        raise LinearizeError(
            f"the state's '{layer}.window_valid' has {held:,} tokens in {slots:,} slots, and by its description the "
            f"text has {tokens:,}; {REMEDY}"
        )
    least, most = _ends(tensors[following])
    if least < 0 or most > tokens + slots:  # it counts slots too, of a ring that was refilled
        raise LinearizeError(
            f"the state's '{following}' counts {least:,} to {most:,}, which is beyond {tokens:,} tokens; {REMEDY}"
        )


def _ends(found: Tensor) -> tuple[int, int]:
    least, most = (int(value) for value in found.to(torch.int64).aminmax())
    return least, most


REMEDY = "the file was not written by this model: read the text again with it (--save-state, read_state)"


def _reach(window: Any) -> int | None:
    """Tokens that a growing window sees, itself among them; None: all."""
    return window.size if isinstance(window, FullWindow) else None


def _other(index: int, layer: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"layer {index} holds its past in a {type(layer).__name__}, which cannot be kept in a state; that can be done "
        "of converted layers, and of softmax layers in the cache that generate() makes by default (DynamicCache)"
    )
