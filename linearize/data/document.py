"""What every source yields: a document, in parts that carry loss or do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
"""A row of a source: column name -> value."""


@dataclass(frozen=True)
class Document:
    """One text that starts with no memory of the one before it.

    The parts are tokenized one by one: where a prompt ends and an answer begins, generation will have the
    same seam.
    """

    parts: tuple[tuple[str, bool], ...]
    """(text, whether its tokens are trained on), in order."""
    framed: bool = False
    """A chat template has already put the begin and end tokens in; none are added."""
    written: tuple[str, ...] | None = None
    """The parts' texts as a template wrote them, in which the control tokens that are spelled count, except the marked
    ones (`linearize.data.control`); None for plain text, in which none does.
    """

    @classmethod
    def plain(cls, text: str) -> Document:
        """All of it is trained on; control tokens that it spells are text."""
        return cls(((text, True),))

    @classmethod
    def rendered(cls, text: str) -> Document:
        """All of it is trained on; control tokens that it spells are control tokens."""
        return cls(((text, True),), written=(text,))

    @property
    def text(self) -> str:
        """The whole text, template included."""
        return "".join(text for text, _ in self.parts)
