"""What ends a run, and what is found wrong with a kernel while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


class EmulationError(Exception):
    """A kernel that cannot be run here, or that does what no kernel may."""


class UnknownInstruction(EmulationError):
    """An instruction that is not modelled; a guess would hide what this tool looks for."""

    def __init__(self, text: str, why: str = "the operation", others: Sequence[str] = ()) -> None:
        self.text, self.why = text, why
        super().__init__(
            f"'{text}': {why} is not known to the emulator, which does not guess"
            + (f"; nor are, in the same kernel, {', '.join(others)}" if others else "")
            + ". Add it to scripts/kernels/emulate with a case in tests/kernels/test_emulated.py "
            "(wgmma: compile for sm_80, --arch 80)"
        )


@dataclass
class Faults:
    """How often each kind of fault was met at each instruction, and in which block first."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    first: dict[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)

    def report(self, kind: str, text: str, block: tuple[int, ...]) -> None:
        """One more of a kind.

        Args:
            kind: what is wrong, in words.
            text: the instruction.
            block: its place in the grid.
        """
        self.counts[kind, text] += 1
        self.first.setdefault((kind, text), block)

    def lines(self) -> list[str]:
        """One a kind and instruction."""
        return [
            f"{kind}: '{text}', {count} times, first in block {self.first[kind, text]}"
            for (kind, text), count in self.counts.items()
        ]
