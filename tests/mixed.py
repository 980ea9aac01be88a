"""A model whose layers have mixers of every kind: recurrent, window alone, softmax without rotation, kept softmax."""

from __future__ import annotations

from typing import Any

import tiny
from transformers import PreTrainedModel

from linearize import surgery

MIXER: dict[str, Any] = {
    "short_conv": {"name": "depthwise"},
    "feature_map": {"name": "identity", "l2_normalize": True},
    "gate": {"name": "mamba2"},
    "update": {"name": "delta"},
    "normalizer": {"name": "none"},
    "output": {"name": "gate", "rank": 3},
    "position": {"name": "rope", "recurrent": False},
}
"""Reads hidden states and plain queries and keys, and keeps a convolution in its state."""
MIXERS: dict[str, Any] = {
    "window": {"feature_map": {"name": "none"}, "window": {"name": "sliding", "size": 6, "first": 2}, "output": None},
    "nope": {
        "feature_map": {"name": "none"},
        "window": {"name": "full", "log_base": 5.0},
        "position": {"name": "rope", "window": False},
    },
    "both": {
        "short_conv": None,
        "gate": None,
        "feature_map": {"name": "hedgehog", "dim": 8},
        "update": {"name": "additive"},
        "normalizer": {"name": "running_sum"},
        "window": {"name": "terraced", "size": 4},
        "position": None,
    },
}  # fmt: skip
LAYERS: dict[str, Any] = {"keep": [2], "use": {"window": [1], "nope": [3], "both": [4]}}
"""Of a model of six."""


def mixed(family: str = "llama", **changes: Any) -> PreTrainedModel:
    """Converted, every parameter of the mixers away from its start."""
    return converted(tiny.model(family, num_hidden_layers=6, **changes))


def converted(model: PreTrainedModel) -> PreTrainedModel:
    """A model of six layers with the mixers."""
    surgery.convert(model, MIXER, LAYERS, MIXERS)
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    return model
