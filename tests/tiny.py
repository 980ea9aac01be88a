"""Random models of a few thousand parameters, one config per family; no download."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from linearize.models import soft_cap

VOCABULARY = 97

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WITHOUT_GROUPS = {key: value for key, value in COMMON.items() if key != "num_key_value_heads"}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}

FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", COMMON),
    "mistral": ("MistralConfig", {**COMMON, "sliding_window": 9}),
    "qwen2": ("Qwen2Config", COMMON),
    "qwen3": ("Qwen3Config", {**COMMON, "head_dim": 16}),
    "smollm3": ("SmolLM3Config", COMMON),
    "gemma2": (
        "Gemma2Config",
        {
            **COMMON,
            "head_dim": 16,
            "sliding_window": 9,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {**COMMON, "head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 16},
    ),
    "phi3": ("Phi3Config", COMMON),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 512,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", WITHOUT_GROUPS),
    "olmo2": ("Olmo2Config", COMMON),
    "granite": ("GraniteConfig", COMMON),
    "starcoder2": ("Starcoder2Config", COMMON),
    "mixtral": ("MixtralConfig", {**COMMON, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", {**COMMON, "head_dim": 16, **EXPERTS}),
}
"""The families that the package promises; sliding layers, soft caps, fused projections and NoPE layers among them."""

KINDS = ("llama", "qwen3", "smollm3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "mixtral")
"""Norms of q and k, layers without positions, soft caps, sliding layers, joined projections, experts."""


def most_kinds() -> list[Any]:
    """All families as parameters of a test, those slow for whose kind one of `KINDS` stands."""
    return [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


SOFTMAX = {"window": {"name": "full"}}
HEDGEHOG = {"feature_map": {"name": "hedgehog", "dim": 8}}
LOLCATS = {**HEDGEHOG, "window": {"name": "sliding", "size": 6}}
LAWCAT = {
    "short_conv": {"name": "depthwise"},
    **HEDGEHOG,
    "gate": {"name": "low_rank", "rank": 3},
    "position": {"name": "rope", "recurrent": False},
    "output": {"name": "gate", "rank": 3},
}
"""Reads hidden states, wants q and k before RoPE, and keeps a convolution in its state."""


OTHERS: dict[str, tuple[str, dict]] = {"gemma": ("GemmaConfig", {**COMMON, "head_dim": 16})}
"""Families that no test of all of them takes."""


def config(family: str, **changes: object) -> PreTrainedConfig:
    """A tiny config of the family."""
    name, values = {**FAMILIES, **OTHERS}[family]
    return getattr(transformers, name)(**{**values, **changes})


def model(family: str = "llama", *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model whose attention is far from uniform, in float32 and eval mode."""
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config(family, **changes), dtype=torch.float32).eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    if soft_cap.capped(made.config):
        soft_cap.honor_soft_cap(made)  # as every teacher that is loaded
    return made


def randomize(mixers, seed: int = 0) -> None:
    """Give mixers parameters away from their symmetric start, so that a swapped head shows."""
    torch.manual_seed(seed)
    for mixer in mixers:
        for parameter in mixer.parameters():
            torch.nn.init.normal_(parameter)


def tokens(batch: int = 2, length: int = 40, seed: int = 1) -> Tensor:
    """Random ids [B, T], special ones left out."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(batch: int = 2, length: int = 40, pad: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and position ids [B, T]; the first row begins with `pad` padding tokens."""
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.int64)
    mask[0, :pad] = 0
    ids[0, :pad] = 0
    return ids, mask, (mask.cumsum(1) - 1).clamp_min(0)
