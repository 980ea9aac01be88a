"""A random two-layer Llama and a word-level tokenizer, both built here: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "a the cat dog sat ran on under mat tree and then it was red blue . Question : Answer"
WORDS = TEXT.split()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; no BOS, and like many teachers no pad token."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<eos>", "<bos>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>")


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,  # far enough from uniform that a wrong shift or mask shows
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def story() -> Callable[[int], str]:
    """story(n): n words, deterministic."""

    def make(count: int) -> str:
        generator = torch.Generator().manual_seed(count)
        return " ".join(WORDS[index] for index in torch.randint(len(WORDS), (count,), generator=generator))

    return make
