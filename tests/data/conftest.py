"""A byte-level tokenizer made on the spot, with a chat template; no download."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|bot|>"]
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|bot|>{{ m['content'] }}</s>\n"
    "{% elif m['role'] == 'user' %}<|user|>{{ m['content'] }}\n{% else %}{{ raise_exception('no such role') }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {
        token: index for index, token in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        extra_special_tokens=["<s>", "<|user|>", "<|bot|>"],
    )
    made.chat_template = CHAT
    return made


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, `</s>` ends a text, nothing opens it."""
    return make_tokenizer()


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    def write(rows: list, name: str = "text.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def parquet(tmp_path: Path) -> Callable[..., str]:
    def write(columns: dict, name: str = "text.parquet", **options) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path, **options)
        return str(path)

    return write
