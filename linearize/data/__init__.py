"""Text and instruction sources to packed token sequences with document boundaries."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from linearize.data import builtin
from linearize.data.document import Document
from linearize.data.text import load_texts

if TYPE_CHECKING:
    from linearize.config.schema import DataConfig
    from linearize.data.echo import Echoed
    from linearize.data.mixing import MixedDataset
    from linearize.data.packing import PackedDataset

__all__ = ["Document", "load_texts", "packed", "validation_documents", "validation_texts"]

HELD_OUT = "held-out"
"""What tables call the text of `data.validation`, and the package's own where no text was named."""
MAX_VALIDATION = 2000
"""Held-out documents at most: no perplexity of ours needs more, and a hub dataset may have millions."""


def packed(
    tokenizer: Any, config: DataConfig, *, tokens: int, seed: int, split: str = "train"
) -> PackedDataset | MixedDataset | Echoed:
    """The packed sequences of a token budget; see `linearize.data.packing.packed`, `mixing.mixed` for a mix and
    `echo.Echoed` for passages that come again.
    """
    from linearize.data.echo import Echoed  # imports torch
    from linearize.data.mixing import mixed
    from linearize.data.packing import packed as pack

    if split != "train":
        return pack(tokenizer, config, tokens=tokens, seed=seed, split=split)
    rows = (mixed if config.mix else pack)(tokenizer, config, tokens=tokens, seed=seed)
    return Echoed(rows, share=config.echo, seed=seed) if config.echo else rows


def validation_documents(config: DataConfig, tokenizer: Any = None) -> list[Document]:
    """The held-out documents, in the source's order, templates written out; at most `MAX_VALIDATION`.

    Args:
        config: its `validation` is read; a hub dataset by its validation split, or its test split. Template and
            column are those of `source`, so they do not concern the built-in sample.
        tokenizer: needed where the template is chat and the source is not the built-in sample.

    Raises:
        DataError: as `load_texts`.
    """
    sample = config.validation in (builtin.NAME, [builtin.NAME])
    documents = load_texts(
        config.validation,
        split="validation",
        text_field=builtin.COLUMN if sample else config.text_field,
        template=builtin.TEMPLATE if sample else config.template,
        tokenizer=tokenizer,
    )
    return list(islice(documents, MAX_VALIDATION))


def validation_texts(config: DataConfig, tokenizer: Any = None) -> list[str]:
    """The held-out documents as they read; see `validation_documents`."""
    return [document.text for document in validation_documents(config, tokenizer)]
