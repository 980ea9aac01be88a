"""Numbers of a config in which layers may differ: transformers refuses to read such a number off the config itself."""

from __future__ import annotations

from typing import Any


def of_layers(config: Any, name: str) -> list[Any]:
    """What a config has under a name, None where it has nothing: one value, or one for each layer where they differ."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:
        return [getattr(layer, name, None) for layer in config.per_layer_config]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def most(config: Any, name: str) -> int | None:
    """The largest number that a config has under a name, or None."""
    return max((x for x in of_layers(config, name) if isinstance(x, int)), default=None)


def head_sizes(config: Any) -> set[int]:
    """Widths of a config's heads; more than one where layers differ, none where the config does not say."""
    heads, width = most(config, "num_attention_heads"), most(config, "hidden_size")
    names = ("head_dim", "global_head_dim", "d_kv")
    known = {size for name in names for size in of_layers(config, name) if isinstance(size, int)}
    if not known and heads and width:
        known = {width // heads}
    return known
