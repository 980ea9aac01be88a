"""Accelerators by name: memory, bandwidth, and the peak that benchmarks measure MFU against."""

from __future__ import annotations

import re
from dataclasses import dataclass

from linearize.bench.flops import PEAKS
from linearize.errors import LinearizeError
from linearize.registry import closest

GIB = 2.0**30
USABLE = 0.92
"""Share of a card's memory that a step can have; the rest is CUDA's context and the allocator's gaps (assumed)."""


@dataclass(frozen=True)
class Card:
    """One accelerator.

    Attributes:
        name: as the user writes it.
        memory: bytes.
        bandwidth: bytes a second, of the data sheet.
        peak: dense bfloat16 FLOP/s, of `bench.flops.PEAKS`.
    """

    name: str
    memory: float
    bandwidth: float
    peak: float

    @property
    def usable(self) -> float:
        """Bytes that a step can have."""
        return USABLE * self.memory


def _card(name: str, kind: str, gib: float, terabytes: float) -> Card:
    return Card(name, gib * GIB, terabytes * 1e12, PEAKS[kind] * 1e12)


CARDS = {
    card.name: card
    for card in (
        _card("h100", "H100", 79.2, 3.35),
        _card("h200", "H200", 139.8, 4.8),
        _card("h100-pcie", "H100 PCIe", 79.2, 2.0),
        _card("h100-nvl", "H100 NVL", 93.0, 3.9),
        _card("gh200", "GH200", 94.5, 4.0),
        _card("a100-80", "A100", 79.2, 2.04),
        _card("a100-40", "A100", 39.4, 1.56),
        _card("l40s", "L40S", 44.4, 0.864),
    )
}
"""Name -> card. Memory as torch reports it, bandwidth of NVIDIA's data sheets (SXM where nothing else is said)."""


def cards(text: str) -> tuple[int, Card]:
    """How many of which: `8xH100`, `h200`.

    Raises:
        LinearizeError: not of that form, or no such card; the message has the nearest.
    """
    found = re.fullmatch(r"(?:([1-9]\d{0,4})\s*[xX]\s*)?([A-Za-z][\w-]*)", text.strip())
    if found is None:
        raise LinearizeError(f"--gpus '{text}': must be a number and a card, such as 8xH100 or h200")
    name = found[2].lower()
    if name not in CARDS:
        raise LinearizeError(f"--gpus {text}: no such card; {closest(name, CARDS)}")
    return int(found[1] or 1), CARDS[name]
