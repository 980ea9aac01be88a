"""Texts to token ids: what every text of a run, trained on or measured, goes through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from linearize.data.control import OPEN, ControlTokens
from linearize.data.document import Document
from linearize.errors import DataError
from linearize.models.boundary import boundary

REMEDY = "take the text out, or mend the tokenizer's files"


class Tokens:
    """Batches of text to token ids, with the begin and end tokens that the model was trained with.

    Args:
        tokenizer: of transformers; fast ones use all cores.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.control = ControlTokens(tokenizer)
        self._split = {"split_special_tokens": True} if self._splits() else {}
        self.end: int | None = tokenizer.eos_token_id
        plain, framed = self(["a"])[0], tokenizer("a")["input_ids"]
        starts = [i for i in range(len(framed)) if framed[i : i + len(plain)] == plain]
        self.begin: list[int] = list(framed[: starts[0]]) if starts else []

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Ids of plain texts, nothing added; a control token that one of them spells is read as its characters.

        Raises:
            DataError: a slow tokenizer that reads it as the control token in any case.
        """
        if not texts:
            return []
        ids = self._encode(texts, **self._split)
        for index, found in enumerate(ids):
            # The unknown token is among them, and means what it should where the text has unknown characters.
            if not self.control.ids.isdisjoint(found):
                ids[index] = self._unspelled(texts[index], found)
        return ids

    def written(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that a template wrote: the control tokens that they spell count, those marked do not."""
        if not texts:
            return []
        ids = self._encode(texts)
        for index, text in enumerate(texts):
            if OPEN in text:
                ids[index] = self._marked(text)
        return ids

    def mixed(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Ids of (text, whether it is written), in their order."""
        plain = iter(self([text for text, written in texts if not written]))
        ready = iter(self.written([text for text, written in texts if written]))
        return [next(ready if written else plain) for _, written in texts]

    def parts(self, document: Document) -> list[list[int]]:
        """Ids of a document's parts, one by one, nothing added."""
        if document.written is None:
            return self([text for text, _ in document.parts])
        return self.written(list(document.written))

    def document(self, document: Document) -> list[int]:
        """Ids of a document in one go, nothing added."""
        if document.written is None:
            return self([document.text])[0]
        return self.written(["".join(document.written)])[0]

    def _encode(self, texts: list[str], **options: Any) -> list[list[int]]:
        options |= {
            "add_special_tokens": False,
            "return_attention_mask": False,
            "return_token_type_ids": False,
        }
        with boundary("the tokenizer", REMEDY, verb="cannot read a text", kind=DataError):
            return list(self._tokenizer(texts, verbose=False, **options)["input_ids"])

    def _splits(self) -> bool:
        """Some classes have no `split_special_tokens`, and say so by refusing it."""
        try:
            self._encode(["a"], split_special_tokens=True)
        except DataError:
            return False
        return True

    def _unspelled(self, text: str, found: list[int]) -> list[int]:
        ids = self.control.plain(text)
        if ids is not None:
            return ids
        spelled = self.control.spelled(text)
        if spelled is None:
            return found
        pieces = self._encode(self.control.broken(text), **self._split)
        ids = [token for piece in pieces for token in piece]
        if not (self.control.ids - {self._tokenizer.unk_token_id}).isdisjoint(ids):
            raise DataError(
                f"the text spells '{spelled}', which this tokenizer ({type(self._tokenizer).__name__}) can only "
                "read as a control token; take it out of the text, or give the checkpoint a tokenizer.json"
            )
        return ids

    def _marked(self, text: str) -> list[int]:
        ids = self.control.written(text)
        if ids is not None:
            return ids
        ids = []
        for piece, mentioned in self.control.split(text):
            ids += self([piece])[0] if mentioned else self._encode([piece])[0]
        return ids
