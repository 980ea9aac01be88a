"""A tiny Llama with a byte tokenizer as an ordinary checkpoint, and a recipe that trains it in a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from linearize.config.schema import DataConfig, EvalConfig, LoraConfig, Recipe, RunConfig, StageConfig

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


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary checkpoint folder of the tiny teacher."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def make_recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """A two-stage recipe on a text file; keyword arguments change the stages' fields."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")

    def make(**changes: Any) -> Recipe:
        common: dict[str, Any] = {
            "tokens": 10 * 2 * 64,
            "batch_size": 2,
            "log_every": 1,
            "save_every": 3,
            **changes,
        }
        return Recipe(
            description="tiny",
            mixer=MIXER,
            stages={
                "transfer": StageConfig(objective={"attention_output_relative": 1.0}, lr=1e-2, **common),
                "recover": StageConfig(
                    objective={"next_token": 1.0, "logits_kl": 0.5},
                    lr=1e-3,
                    train=["lora"],
                    lora=LoraConfig(rank=2, alpha=4, dropout=0.1),
                    **common,
                ),
            },
            data=DataConfig(source=str(text), validation=str(text), length=64),
            eval=EvalConfig(length=64, max_windows=4),
            run=RunConfig(device="cpu"),
        )

    return make


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny tensors: threads only wait for each other."""
    torch.set_num_threads(1)
