"""Words that items are made of: chosen here, common enough for any tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import yaml

_LISTS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
ADJECTIVES, NOUNS, FIRST, LAST = (_LISTS[name].split() for name in ("adjectives", "nouns", "first", "last"))


def word(random: Random) -> str:
    """Such as "bright-harbor"."""
    return f"{random.choice(ADJECTIVES)}-{random.choice(NOUNS)}"


def digits(random: Random, count: int) -> str:
    """A number of so many digits."""
    return str(random.randrange(10 ** (count - 1), 10**count))


def uuid(random: Random) -> str:
    """A random UUID, version 4."""
    text = f"{random.getrandbits(128):032x}"
    text = f"{text[:12]}4{text[13:16]}{'89ab'[int(text[16], 16) % 4]}{text[17:]}"
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def different(
    make: Callable[[Random], str], random: Random, count: int, known: tuple[str, ...] = ()
) -> list[str]:
    """So many values of `make(random)`, all different from each other and from `known`."""
    found: dict[str, None] = {}
    while len(found) < count:
        value = make(random)
        if value not in known:
            found[value] = None
    return list(found)
