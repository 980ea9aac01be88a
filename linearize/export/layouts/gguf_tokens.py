"""A byte-level BPE tokenizer as a GGUF file holds it: the vocabulary, its merges, and the name of how text is split."""

from __future__ import annotations

import json
from typing import Any

from linearize.errors import UnsupportedModelError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "gpt-2": ("bytes",),
    "smollm": ("digits", "bytes"),
    "llama-bpe": (_WORDS + r"\p{N}{1,3}" + _REST, "bytes alone"),
    "qwen2": (_WORDS + r"\p{N}" + _REST, "bytes alone"),
}
"""llama.cpp's name -> the steps of `tokenizers` that split text in that way."""
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of token (`gguf.TokenType`)."""


def split_name(backend: dict[str, Any]) -> str | None:
    """llama.cpp's name of how a tokenizer splits text, or None where it is none of `SPLITS`.

    Args:
        backend: tokenizer.json.
    """
    given = backend.get("pre_tokenizer") or {}
    steps = given.get("pretokenizers", []) if given.get("type") == "Sequence" else [given]
    words = []
    for step in steps:
        kind = step.get("type")
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            words.append("bytes" if step.get("use_regex", True) else "bytes alone")
        elif kind == "Digits" and step.get("individual_digits"):
            words.append("digits")
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            words.append(str(step.get("pattern", {}).get("Regex")))
        else:
            return None
    return next((name for name, one in SPLITS.items() if one == tuple(words)), None)


def add_tokens(writer: Any, tokenizer: Any, vocabulary: int) -> None:
    """Write a tokenizer into a GGUF file.

    Args:
        writer: `gguf.GGUFWriter`.
        tokenizer: of transformers.
        vocabulary: rows of the embeddings; those behind the last token become unused ones.

    Raises:
        UnsupportedModelError: it is no byte-level BPE tokenizer, or splits text in a way that has no name here.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    model, name = backend.get("model", {}), split_name(backend)
    if model.get("type") != "BPE" or model.get("byte_fallback") or name is None or not model.get("merges"):
        raise UnsupportedModelError(
            f"--layout gguf: the tokenizer ({type(tokenizer).__name__}, {model.get('type') or 'not a fast one'}) is "
            f"none of the byte-level BPE kinds that are written ({', '.join(SPLITS)}); take --layout fla, or the "
            "checkpoint as it is"
        )
    words = {index: word for word, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for index in range(vocabulary):
        special = added.get(index)
        tokens.append(words.get(index, f"[PAD{index}]"))
        if index not in words:
            kinds.append(UNUSED)
        elif special is None:
            kinds.append(NORMAL)
        else:
            kinds.append(CONTROL if special.special else USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    )
    for role in ("bos", "eos", "pad", "unk"):
        token = getattr(tokenizer, f"{role}_token_id", None)
        if token is not None:
            getattr(writer, f"add_{role}_token_id")(token)
    start = tokenizer("").input_ids
    writer.add_add_bos_token(bool(start) and start[0] == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
