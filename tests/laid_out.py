"""Tiny exports whose mixers hold random numbers, for foreign layouts: each is equal to another library's layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from linearize import export, surgery
from linearize.config import outline

DELTA: dict[str, Any] = {
    "short_conv": {"name": "depthwise", "roles": "qkv", "activation": "silu"},
    "feature_map": {"name": "identity", "l2_normalize": True},
    "update": {"name": "delta", "bias": False, "rescales": False},
    "normalizer": {"name": "group_norm", "kind": "rms"},
    "position": {"name": "rope", "recurrent": False},
}
"""DeltaNet as published and as fla has it."""
FAMILIES: dict[str, Any] = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "mistral": (MistralForCausalLM, MistralConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
}
WINDOW: dict[str, Any] = {"feature_map": {"name": "none"}, "window": {"name": "sliding", "size": 8}}


def recipe(name: str, **changes: Any) -> dict[str, Any]:
    """The mixer of a shipped recipe, with some parts exchanged."""
    return {**outline(name)["mixer"], **changes}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte and one of two, then <bos>, <eos>, <pad>."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*symbols, "th"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def teacher(family: str = "llama", **changes: Any) -> Any:
    """Three layers, four query heads over two key-value heads that fill a width of 32."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 257,
        "eos_token_id": 258,
        "pad_token_id": 259,
        **changes,
    }
    cls, config = FAMILIES[family]
    model = cls(config(**sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def saved(
    folder: Path,
    mixer: dict[str, Any],
    layers: Any = None,
    *,
    mixers: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    stirred: float = 0.2,
    **changes: Any,
) -> Path:
    """An export of a converted `teacher`, noise on every parameter of its mixers."""
    model = surgery.convert(
        teacher(**changes).to(dtype), mixer, [0, 1, 2] if layers is None else layers, mixers=mixers
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in surgery.converted(model):
            for parameter in layer.mixer.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * stirred)
    return export.save(model, folder, tokenizer=tokenizer(), base="tiny")


def text(tokens: int, rows: int = 1) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(0, 256, (rows, tokens), generator=torch.Generator().manual_seed(0))
