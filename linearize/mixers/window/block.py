"""Softmax within blocks (TransNormer's DiagAttention, Qin et al. 2022, arXiv 2210.10340, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linearize.mixers.base import LayerShape
from linearize.mixers.options import LONGEST, number
from linearize.mixers.window import WINDOWS
from linearize.mixers.window.ring import RingWindow
from linearize.mixers.window.terraced import TerracedWindow


@WINDOWS.register("block")
class BlockWindow(TerracedWindow):
    """A query sees its own block of `size` tokens up to itself, and nothing before: 1 to `size` keys.

    Blocks are counted as in `terraced`. Nothing is handed on when a block ends: a recurrent branch beside it sees every
    key at once. `first` and `sinks` are those of `sliding`.

    Limitations: the first token of a block sees itself alone, and may be any token of a sentence.
    """

    @dataclass
    class Config(RingWindow.Config):
        size: int = number(64, least=1, most=LONGEST)
        """Tokens in a block."""
        overlap: bool = True
        """The recurrent branch sees every key at once; there is no other way."""

        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            late = (
                []
                if self.overlap
                else ["overlap: false has no meaning with blocks, which hand nothing on; remove it"]
            )
            return late + super().problems()

    def __init__(self, config: Config, shape: LayerShape) -> None:
        RingWindow.__init__(self, config, shape, size=config.size, span=config.size)

    @property
    def least(self) -> int:
        return 1

    def _terrace(self, position: Tensor) -> Tensor:
        """Tokens from the start of the block to a query at `position`."""
        return position % self.size + 1
