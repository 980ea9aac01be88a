"""Tokenize and pack: documents end to end, cut into sequences of one length, with their boundaries kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from linearize.data.document import Document
from linearize.data.store import Taken, key_of, stored
from linearize.data.text import load_texts
from linearize.data.tokens import Tokens
from linearize.errors import DataError

if TYPE_CHECKING:
    from linearize.config.schema import DataConfig

log = logging.getLogger(__name__)

IGNORED = -100
"""Label of a token that no loss is taken on; the convention of torch and transformers."""

PIECE = 200_000
"""Characters tokenized in one go: a longer document is cut at white space, so that a small budget reads
little of it.
"""

BATCH = 1_000_000
"""Characters handed to the tokenizer at once; it splits them over the processor's cores."""

START, LOSS = 1, 2
"""Bits of a token's flags: first of its document; trained on."""


class PackedDataset(Dataset[dict[str, torch.Tensor]]):
    """Packed sequences, made of flat arrays when they are asked for.

    An item holds three int64 tensors of shape ``[T]``: ``input_ids``; ``position_ids``, from 0 at the start
    of the sequence and, with boundaries, again at each document's start; ``labels``, equal to input_ids and
    **not shifted** (the model's loss shifts), with -100 on prompt tokens, on the first token of the sequence
    (nothing comes before it) and, with boundaries, on the first token of each document (what comes before it
    is another document).

    Args:
        tokens: ``[N * T]`` token ids.
        flags: ``[N * T]`` bits START and LOSS of each token.
        length: T.
        boundaries: whether documents are kept apart.
    """

    def __init__(self, tokens: np.ndarray, flags: np.ndarray, *, length: int, boundaries: bool) -> None:
        assert len(tokens) == len(flags) and len(tokens) % length == 0
        self.length = length
        self.boundaries = boundaries
        self._tokens = tokens.reshape(-1, length)
        self._flags = flags.reshape(-1, length)

    @property
    def num_tokens(self) -> int:
        """Tokens in all sequences together."""
        return self._tokens.size

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self._tokens[index].astype(np.int64)
        flags = self._flags[index]
        positions = np.arange(self.length, dtype=np.int64)
        unpredicted = positions == 0
        if self.boundaries:
            starts = (flags & START) != 0
            positions = positions - np.maximum.accumulate(np.where(starts, positions, 0))
            unpredicted |= starts
        labels = np.where(unpredicted | ((flags & LOSS) == 0), IGNORED, ids)
        return {
            "input_ids": torch.from_numpy(ids),
            "position_ids": torch.from_numpy(positions),
            "labels": torch.from_numpy(labels),
        }


def packed(
    tokenizer: Any, config: DataConfig, *, tokens: int, seed: int, split: str = "train"
) -> PackedDataset:
    """The packed sequences of a token budget.

    Documents are drawn in an order that the seed fixes and tokenized in batches until the budget is reached,
    each closed by the end-of-text token (and opened by a begin-of-text token where the tokenizer adds one).
    Text that holds less than the budget gives what there is; the trainer goes over it again.

    Args:
        tokenizer: of the model.
        config: source, template, sequence length T and whether boundaries are kept.
        tokens: budget; ``ceil(tokens / T)`` sequences at most.
        seed: of the order of documents.
        split: "train" reads `config.source`, "validation" reads `config.validation`.

    Raises:
        DataError: the text is missing, unreadable, empty, shorter than one sequence, or all prompt.
    """
    if tokenizer is None:
        raise DataError(
            "the model has no tokenizer, so text cannot be packed for it; put the tokenizer's files in its "
            "folder"
        )
    validation = split == "validation"
    source = config.validation if validation else config.source
    shown = _shown(source)
    part = "validation" if validation else config.split
    length = config.length
    wanted = max(1, math.ceil(tokens / length)) * length
    documents = load_texts(
        source,
        split=part,
        text_field=config.text_field,
        template=config.template,
        tokenizer=tokenizer,
        seed=seed,
    )

    def take() -> Taken:
        ids, flags = _take(Tokens(tokenizer), documents, wanted)
        if len(ids) < length:
            raise DataError(
                f"{shown}: the text has {len(ids):,} tokens, fewer than one sequence of {length:,}; give more "
                "text or lower data.length"
            )
        whole = len(ids) // length * length
        return _drop_untrained(ids[:whole], flags[:whole], config, shown)

    key = key_of(tokenizer, config, source, wanted=wanted, seed=seed, split=part)
    taken = stored(key, take)
    dataset = PackedDataset(taken.tokens, taken.flags, length=length, boundaries=config.boundaries)
    if taken.dropped:
        log.info(
            "%s: %d of %d sequences hold no token to train on (prompts, first tokens of documents) and are left out",
            shown,
            taken.dropped,
            taken.dropped + len(dataset),
        )
    if dataset.num_tokens < wanted:
        log.info(
            "%s holds %s of the %s tokens asked for: it is repeated",
            shown,
            f"{dataset.num_tokens:,}",
            f"{wanted:,}",
        )
    return dataset


def _shown(source: Any) -> str:
    """A source in a message: of many files the first."""
    if isinstance(source, (list, tuple)) and len(source) > 3:
        return f"{source[0]} and {len(source) - 1} more"
    return str(source)


@dataclass(frozen=True)
class _Piece:
    """What is tokenized in one go: a document's part, or a stretch of a long one."""

    text: str
    written: bool
    loss: bool
    first: bool
    last: bool
    framed: bool


def _take(encode: Tokens, documents: Iterator[Document], wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and flags of the first `wanted` tokens of the documents, or of all there are."""
    ids: list[np.ndarray] = [np.empty(0, np.int32)]
    flags: list[np.ndarray] = [np.empty(0, np.uint8)]
    count, opening = 0, False
    pieces = _pieces(documents)
    told = False
    while count < wanted:
        batch = _batch(pieces, characters=min(BATCH, max(4096, 4 * (wanted - count))))
        if not batch:
            break
        told = told or _tell(encode, batch)
        encoded = encode.mixed([(piece.text, piece.written) for piece in batch])
        for piece, tokens in zip(batch, encoded, strict=True):
            if piece.first and not piece.framed and tokens[: len(encode.begin)] != encode.begin:
                tokens = encode.begin + tokens
            if piece.last and not piece.framed and encode.end is not None and tokens[-1:] != [encode.end]:
                tokens = [*tokens, encode.end]
            marks = np.full(len(tokens), LOSS if piece.loss else 0, dtype=np.uint8)
            opening = opening or piece.first
            if opening and len(tokens):  # a first piece may come to no token at all
                marks[0] |= START
                opening = False
            ids.append(np.asarray(tokens, dtype=np.int32))
            flags.append(marks)
            count += len(tokens)
    return np.concatenate(ids)[:wanted], np.concatenate(flags)[:wanted]


def _tell(encode: Tokens, batch: list[_Piece]) -> bool:
    """Say so where plain text spells a control token: a template may have been meant. Returns whether it was said."""
    for piece in batch:
        spelled = None if piece.written else encode.control.spelled(piece.text)
        if spelled is not None:
            log.info(
                "the text spells '%s', which is read as text, not as the control token; where a chat template is "
                "written out in it, set data.template=rendered",
                spelled,
            )
            return True
    return False


def _pieces(documents: Iterator[Document]) -> Iterator[_Piece]:
    for document in documents:
        written = document.written is not None
        texts = document.written or [text for text, _ in document.parts]
        stretches = [
            (stretch, loss)
            for text, (_, loss) in zip(texts, document.parts, strict=True)
            for stretch in _stretches(text)
        ]
        for index, (text, loss) in enumerate(stretches):
            yield _Piece(text, written, loss, index == 0, index == len(stretches) - 1, document.framed)


def _stretches(text: str) -> Iterator[str]:
    """The text in stretches of at most `PIECE` characters; the white space at a cut opens the next one."""
    start = 0
    while len(text) - start > PIECE:
        end = start + PIECE
        cut = max(text.rfind(" ", start + 1, end), text.rfind("\n", start + 1, end))
        cut = cut if cut > start else end
        yield text[start:cut]
        start = cut
    yield text[start:]


def _batch(pieces: Iterator[_Piece], *, characters: int) -> list[_Piece]:
    batch: list[_Piece] = []
    size = 0
    while size < characters and (piece := next(pieces, None)) is not None:
        batch.append(piece)
        size += len(piece.text)
    return batch


def _drop_untrained(ids: np.ndarray, flags: np.ndarray, config: DataConfig, source: Any) -> Taken:
    """Without the sequences that have no label (a long prompt fills them): their mean loss would be 0 / 0.

    Raises:
        DataError: none is left.
    """
    length = config.length
    ids, flags = ids.reshape(-1, length), flags.reshape(-1, length)
    predicted = (flags & LOSS) != 0
    predicted[:, 0] = False
    if config.boundaries:
        predicted &= (flags & START) == 0
    kept = predicted.any(axis=1)
    if not kept.any():
        raise DataError(
            f"{source}: no sequence of {length:,} tokens has a token to train on; the prompts fill them "
            "all: raise data.length, or use template 'none'"
        )
    return Taken(ids[kept].ravel(), flags[kept].ravel(), int((~kept).sum()))
