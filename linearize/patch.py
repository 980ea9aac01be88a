"""Change what a library does where it has no option for it, and only for as long as one call takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value inside the block; one that this version of the owner lacks is left alone.

    Args:
        owner: a module or an object.
        name: of the attribute.
        value: what it is inside.
    """
    if not hasattr(owner, name):
        yield
        return
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
