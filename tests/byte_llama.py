"""A tiny Llama with a byte tokenizer, a mixer for it, and a text that it can learn something from."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MIXER: dict[str, Any] = {
    "feature_map": {"name": "hedgehog"},
    "window": {"name": "sliding", "size": 8},
    "combine": {"name": "shared_normalizer"},
}
TEXT = "".join(
    f"In the year {year} the river rose by {year % 37} feet, and the miller of house {year % 11} moved his corn. "
    for year in range(1500, 1900)
)


def tiny_llama(layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    """Two layers, four query heads over two key-value heads, 259 tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # the default makes attention uniform, and there would be nothing to learn
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    return LlamaForCausalLM(config).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, then <bos>, <eos>, <pad>."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
