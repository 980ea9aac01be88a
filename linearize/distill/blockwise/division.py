"""Layers in blocks: how many stand together, and which blocks are asked for."""

from __future__ import annotations

import re

from linearize.errors import LinearizeError


def blocks(layers: int, size: int) -> list[range]:
    """Layers 0 .. `layers` - 1 in blocks of `size`, the last one perhaps smaller."""
    return [range(first, min(first + size, layers)) for first in range(0, layers, size)]


def named(block: range) -> str:
    """A block's layers in words."""
    return f"layer {block[0]}" if len(block) == 1 else f"layers {block[0]} to {block[-1]}"


def chosen(text: str | None, count: int) -> list[int]:
    """Numbers of blocks: `3`, `0-9` or `0-3,8`; all where nothing is said.

    Raises:
        LinearizeError: not of that form, or no such block.
    """
    if text is None:
        return list(range(count))
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if match is None:
            raise LinearizeError(f"--blocks '{text}': give numbers of blocks, such as 3, 0-9 or 0-3,8")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= count:
            raise LinearizeError(f"--blocks '{text}': there are blocks 0 to {count - 1}; give some of these")
        found += [number for number in range(first, last + 1) if number not in found]
    return found
