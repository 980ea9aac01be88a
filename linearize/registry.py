"""Names to classes, filled by discovery, with a did-you-mean for a name that is not there.

A checkpoint stores registry names and plain numbers only, so that loading one never imports what it names.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Generic, TypeVar

from linearize.errors import LinearizeError

T = TypeVar("T")


def closest(name: str, names: Iterable[str]) -> str:
    """A `did you mean` clause, or the list of valid names when nothing is near.

    Args:
        name: what was written.
        names: what would have been valid.

    Returns:
        ``"did you mean 'lolcats'?"`` or ``"valid: a, b, c"``.
    """
    valid = sorted(names)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"valid: {', '.join(valid) or 'none'}"


class Registry(Generic[T]):
    """One kind of part: registered by decorator, listed by name.

    Args:
        kind: what the entries are, for messages ("feature map").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that files the class under `name` and sets its `name` attribute."""

        def add(cls: type[T]) -> type[T]:
            known = self._entries.get(name)
            same = known is None or known.__qualname__ == cls.__qualname__
            assert same, f"{self.kind} '{name}' registered twice"
            self._entries[name] = cls
            cls.name = name  # type: ignore[attr-defined]
            return cls

        return add

    def get(self, name: str) -> type[T]:
        """The class of that name.

        Raises:
            LinearizeError: no such entry; the message offers the nearest name.
        """
        if name not in self._entries:
            raise LinearizeError(f"unknown {self.kind} '{name}': {closest(str(name), self._entries)}")
        return self._entries[name]

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries


def discover(package: ModuleType) -> None:
    """Import every module of a package, so that its registered classes are filed: adding a part is adding a file."""
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
