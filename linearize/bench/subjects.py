"""What whole-model benchmarks run: shapes of known models with random weights, and the mixers put into them.

Random weights are as fast as trained ones, and nothing is downloaded.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from linearize.errors import LinearizeError
from linearize.registry import closest

LONG = 131_072
"""Positions of every shape, so that long contexts can be timed in models that were trained on short ones."""
SMOLLM2_135M = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": LONG,
    "rope_theta": 100_000.0, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": SMOLLM2_135M,
    "smollm2-360m": SMOLLM2_135M | {
        "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
        "num_key_value_heads": 5,
    },
    "llama-3.2-1b": {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": LONG,
        "rope_theta": 500_000.0, "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": LONG,
        "rope_theta": 500_000.0, "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": LONG,
        "rope_theta": 10_000.0, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Name -> what `LlamaConfig` takes; `tiny` is for tests."""
RANDOM = "random"
"""Instead of a model: a known shape with random weights, which is no faster and no slower."""
TEACHER = "teacher"
"""The softmax model itself, in the place of a recipe's name."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gated_delta_window_token": ("gated_delta_window", {"combine": {"name": "sigmoid", "per": "token"}}),
    "lolcats_unpinned": ("lolcats", {"window": {"name": "sliding", "size": 64}}),
}
"""Mixers that are measured beside those of the recipes: name -> a recipe, and the parts that differ."""


def subjects() -> list[str]:
    """Names of the shipped recipes and of `VARIANTS`."""
    from linearize.config.compose import list_recipes

    return [*(name for name, _ in list_recipes()), *VARIANTS]


def chosen(names: Sequence[str]) -> list[str]:
    """The subjects of these names; all without names or with the name `all`.

    Raises:
        LinearizeError: no such recipe; the message has the nearest.
    """
    known = subjects()
    for name in names:
        if name not in (*known, TEACHER, "all"):
            raise LinearizeError(f"--recipes {name}: no such recipe; {closest(name, known)}")
    wanted = [name for name in names if name != TEACHER]
    return known if not names or "all" in names else wanted


def mixers_of(name: str) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """A subject's `mixer`, `layers` and `mixers`, as `surgery.convert` takes them."""
    from linearize.config import compose

    recipe, parts = VARIANTS.get(name, (name, {}))
    found = compose(recipe)
    return {**found.mixer, **parts}, found.layers, found.mixers


def layers_of_each(name: str) -> int:
    """Layers of the smallest model in which each of a subject's mixers has one, at least two."""
    if name == TEACHER:
        return 2
    from linearize.config.layers import assign, used

    _, layers, mixers = mixers_of(name)
    wanted = {*used(layers, mixers)}
    return next((n for n in range(2, 65) if wanted <= {*assign(layers, range(n), mixers).values()}), 2)


def random_model(
    device: str | torch.device, dtype: torch.dtype, shape: str = "smollm2-135m", **changes: Any
) -> Any:
    """A shape's model with random weights, in evaluation mode.

    Args:
        device, dtype: of the weights.
        shape: of `SHAPES`.
        changes: to its config.

    Raises:
        LinearizeError: no such shape.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    if shape not in SHAPES:
        raise LinearizeError(f"--shape {shape}: no such shape; {closest(shape, SHAPES)}")
    torch.manual_seed(0)
    with torch.device(device):
        made = AutoModelForCausalLM.from_config(LlamaConfig(**{**SHAPES[shape], **changes}), dtype=dtype)
    return made.eval()


def convert(model: Any, name: str) -> Any:
    """The model with a subject's untrained mixers, in place; `TEACHER` leaves it as it is. Mixers are in float32."""
    from linearize import surgery

    if name == TEACHER:
        return model
    return surgery.convert(model, *mixers_of(name)).eval()


def converted(teacher: Any, recipe: str) -> tuple[Any, Any]:
    """A copy of a model with a recipe's mixers, untrained, and the model."""
    return convert(copy.deepcopy(teacher), recipe), teacher
