"""The shipped openings as a teacher's tokens: plain ones as they are, first turns through its chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from linearize.data.chat import Chat
from linearize.data.tokens import Tokens
from linearize.errors import DataError

FILE = Path(__file__).parent / "openings.json"
"""Kind -> openings; written by scripts/make_openings.py."""
CHAT = "chat"
"""The kind whose openings are what a user says first."""
CHAT_SHARE = 0.3
"""Of the documents, where a teacher has a chat template and nothing else is asked for."""


@cache
def shipped() -> dict[str, list[str]]:
    """Kind -> openings."""
    found: dict[str, list[str]] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


@dataclass(frozen=True)
class Openings:
    """Openings in a teacher's tokens.

    Attributes:
        ids: of each opening, with the tokens that a text begins with.
        kinds: of each opening.
        begin: tokens that a text begins with, which are no part of it.
    """

    ids: list[list[int]]
    kinds: list[str]
    begin: list[int]

    def order(self, rows: int, many: int, chat: float, seed: int) -> np.ndarray:
        """Numbers of openings [rows, many], drawn evenly, `chat` of them first turns."""
        rng = np.random.default_rng(seed)
        turns = np.flatnonzero([kind == CHAT for kind in self.kinds])
        plain = np.flatnonzero([kind != CHAT for kind in self.kinds])
        drawn = rng.choice(plain, (rows, many)) if len(plain) else rng.choice(turns, (rows, many))
        if not chat or not len(turns):
            return drawn
        return np.where(rng.random((rows, many)) < chat, rng.choice(turns, (rows, many)), drawn)


def openings(tokenizer: Any, *, chat: bool, longest: int) -> Openings:
    """The openings of a teacher.

    Args:
        tokenizer: its own.
        chat: with first turns, in its chat template.
        longest: tokens; longer openings are left out.

    Raises:
        DataError: the chat template refuses a turn, or no opening is as short.
    """
    encode = Tokens(tokenizer)
    found: list[tuple[list[int], str]] = []
    for kind, texts in shipped().items():
        if kind != CHAT:
            found += [(encode.begin + ids, kind) for ids in encode(texts)]
        elif chat:
            template = Chat(tokenizer)
            for text in texts:
                document = template.prompt([{"role": "user", "content": text}])
                found.append((encode.document(document), kind))
    short = [(ids, kind) for ids, kind in found if 0 < len(ids) <= longest]
    if not any(kind != CHAT for _, kind in short) or (chat and not any(kind == CHAT for _, kind in short)):
        raise DataError(
            f"data.teacher.length: no opening{' of a conversation' if chat else ''} has {longest} tokens or fewer; "
            f"raise it{', or set data.teacher.chat to 0' if chat else ''}"
        )
    return Openings([ids for ids, _ in short], [kind for _, kind in short], encode.begin)
