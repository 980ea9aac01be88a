"""Configs by name of models that nobody needs to fetch in order to plan."""

from __future__ import annotations

from typing import Any

from linearize.bench.subjects import SHAPES
from linearize.errors import LinearizeError
from linearize.registry import closest

LARGE: dict[str, dict[str, Any]] = {
    "llama-3-70b": {
        "vocab_size": 128_256, "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131_072,
        "rope_theta": 500_000.0, "tie_word_embeddings": False,
    },
    "llama-3-405b": {
        "vocab_size": 128_256, "hidden_size": 16_384, "intermediate_size": 53_248, "num_hidden_layers": 126,
        "num_attention_heads": 128, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131_072,
        "rope_theta": 500_000.0, "tie_word_embeddings": False,
    },
    "qwen3-32b": {
        "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 5120, "intermediate_size": 25_600,
        "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40_960, "rope_theta": 1_000_000.0, "tie_word_embeddings": False,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral", "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32_768,
        "rope_theta": 1_000_000.0, "num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "max_position_embeddings": 40_960, "rope_theta": 1_000_000.0, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Name -> config, of their publishers' config.json (Llama 3 herd of models 2024, arXiv 2407.21783, table 3; Qwen3 2025,
arXiv 2505.09388, tables 1 and 2; Mixtral 2024, arXiv 2401.04088, table 1); a Llama where no type is said."""


def known() -> list[str]:
    """Names of shapes, benchmarks' own first."""
    return [*(name for name in SHAPES if name != "tiny"), *LARGE]


def config_of(model: str) -> Any:
    """The config of a shape's name, or of any MODEL; weights are neither fetched nor read.

    Raises:
        LinearizeError: as `models.load_config`.
    """
    from transformers import AutoConfig

    found = {**SHAPES, **LARGE}.get(model.lower())
    if found is None:
        from linearize.models import load_config

        try:
            return load_config(model)
        except LinearizeError as error:
            # a shape's name that is misspelt looks like a model of the hub
            raise type(error)(f"{error}. As a shape's name: {closest(model.lower(), known())}") from error
    return AutoConfig.for_model(**{"model_type": "llama", **found})
