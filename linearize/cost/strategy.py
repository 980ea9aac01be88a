"""How a stage fits on the cards there are: whole on one, a copy on each, in shards, or not at all.

Sharded (`distill.shards`): base weights, their gradients and moments, and the teacher are split evenly over all cards
(Rajbhandari et al. 2020, arXiv 1910.02054, section 5, ZeRO-3). Mixers and adapters stay whole on each. Two layers are
gathered in bfloat16 at a time, one computed and one ahead, and embedding and head for the length of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

from linearize.cost.cards import Card
from linearize.cost.memory import Sizes, parts
from linearize.distill.memory import TOKENS
from linearize.distill.micro import divisor

SHARDED = ("frozen", "masters", "gradients", "adamw", "teacher")
MOST = 4096
"""Cards that are tried at most."""


@dataclass(frozen=True)
class Fit:
    """A way in which a stage runs.

    Attributes:
        way: one card, ddp, sharded or none.
        cards: that work; where nothing fits, those that would.
        micro: sequences at once on each.
        checkpointing: whether activations are computed twice.
        bytes: of a card, by part.
    """

    way: str
    cards: int
    micro: int
    checkpointing: bool
    bytes: dict[str, float]

    @property
    def peak(self) -> float:
        """Bytes of a card."""
        return sum(self.bytes.values())


def fit(
    sizes: Sizes,
    kind: str,
    batch: int,
    length: int,
    count: int,
    card: Card,
    *,
    checkpointing: bool,
    micro: int | None = None,
) -> Fit:
    """The least way that fits: no checkpointing before checkpointing, a whole copy before shards.

    Args:
        sizes, kind: see `memory.parts`.
        batch, length: sequences of a step over all cards, and tokens of each.
        count, card: what there is.
        checkpointing: whether the recipe asks for it anyway.
        micro: sequences at once; None for as many as fit.
    """
    for way, cards in _ways(count, batch):
        for again in (True,) if checkpointing or kind == "transfer" else (False, True):
            found = _at(sizes, kind, batch, length, way, cards, card, again and kind != "transfer", micro)
            if found is not None:
                return found
    cards = 2
    while cards < MOST:
        found = _at(sizes, kind, cards, length, "none", cards, card, kind != "transfer", 1)
        if found is not None:
            return found
        cards *= 2
    return Fit("none", 0, 1, True, shares(sizes, kind, length, "none", MOST, True))


def _ways(count: int, batch: int) -> list[tuple[str, int]]:
    """Ways to try, with the cards that a batch can keep busy."""
    used = divisor(batch, min(count, batch))
    return [("one card", 1)] if used == 1 else [("ddp", used), ("sharded", used)]


def _at(
    sizes: Sizes,
    kind: str,
    batch: int,
    length: int,
    way: str,
    cards: int,
    card: Card,
    checkpointing: bool,
    micro: int | None,
) -> Fit | None:
    """With as many sequences at once as fit, as `distill.micro` finds them; None where not even one does."""
    own = batch // cards
    size = divisor(own, min(own, max(1, TOKENS // length))) if micro is None else min(micro, own)
    while True:
        found = shares(sizes, kind, size * length, way, cards, checkpointing)
        if sum(found.values()) <= card.usable:
            return Fit(way, cards, size, checkpointing, found)
        if size == 1 or micro is not None:
            return None
        size = divisor(own, size // 2)


def shares(
    sizes: Sizes, kind: str, tokens: int, way: str, cards: int, checkpointing: bool
) -> dict[str, float]:
    """Bytes by part on one of the cards."""
    found = parts(sizes, kind, tokens, checkpointing=checkpointing)
    if way in ("one card", "ddp"):
        return found | {"gathered": 0.0}
    kept = min(sizes.whole, sizes.trained) / max(1, sizes.trained)
    split = {part: 1 / cards if part in SHARDED else 1.0 for part in found}
    split |= {part: kept + (1 - kept) / cards for part in ("masters", "gradients", "adamw")}
    found["masters"] -= 2.0 * sizes.body  # products keep what is gathered, which is no copy and goes
    layer = 2.0 * max(0, sizes.total - sizes.whole - 2 * sizes.head) / sizes.layers
    return {part: value * split[part] for part, value in found.items()} | {
        "gathered": 2 * layer + 4.0 * sizes.head
    }
