"""Other people's words inside markdown: shown as they are, whatever characters they hold."""

from __future__ import annotations

import re

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_SPECIAL = re.compile(r"[\\`*|~$\[\]]|(?<![^\W_])_|_(?![^\W_])")
"""What begins markup inside a line; an underscore inside a word does not."""
_FIRST = re.compile(r"^(?:#|[-+](?=\s|-|$)|\d+[.)](?=\s|$))")
"""What begins a block at the start of a line: a heading, a list, a rule."""
_FENCE = re.compile(r"`{3,}")


def text(value: object) -> str:
    """A value as words within a line, a heading or a table's cell: one line, without markup, HTML or new columns."""
    line = " ".join(str(value).split())
    line = "".join(character for character in line if character.isprintable())
    line = _SPECIAL.sub(lambda match: "\\" + match[0], line)
    line = "".join(_ENTITIES.get(character, character) for character in line)
    return _FIRST.sub(lambda match: f"{match[0][:-1]}\\{match[0][-1]}", line)


def row(cells: list[str]) -> str:
    """A line of a table; the cells are markdown already."""
    return "| " + " | ".join(cells) + " |"


def fenced(content: str, language: str) -> str:
    """A block of code that no fence inside the content can end."""
    longest = max((len(match[0]) for match in _FENCE.finditer(content)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{content}\n{fence}"
