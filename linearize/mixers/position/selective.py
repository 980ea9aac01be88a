"""Rotary positions with angles that follow the text (Selective RoPE, Movahedi et al. 2025, arXiv 2511.17388)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.mixers.base import LayerShape, running, wide
from linearize.mixers.low_rank import LowRank
from linearize.mixers.options import WIDEST, number
from linearize.mixers.position import POSITIONS
from linearize.mixers.position.rope import Rope
from linearize.mixers.rotations import HALF, WAYS


@POSITIONS.register("selective_rope")
class SelectiveRope(Rope):
    """In the recurrent branch every token turns what follows by angles of its own, on top of the teacher's rotation.

    q_t and k_t are turned by phi_t, the sum of w_s over the tokens of the document so far, w = base + x W1 W2 for each
    key-value head and each plane of two dims, the teacher's planes: (i, i + K / 2), or (2i, 2i + 1) where it turns
    neighbours. A key is seen under the angles of the tokens between it and the query.
    base = W1 = 0 at the start, where it is the teacher's rotation, or none where `recurrent` is false.

    Limitations: the paper has a short convolution, a temperature and optionally a gate on the angles. Where the teacher
    rotates a part of a head, `width` has to say how many dims, or angles turn other planes than its own and depend on
    where in the text two tokens stand, not on what lies between them alone. Keys that come late out of a window have no
    angle of their own.
    """

    @dataclass
    class Config(Rope.Config):
        rank: int = number(32, least=1, most=WIDEST)
        """Width between W1 [D, rank] and W2."""
        width: int = number(0, least=0, most=WIDEST)
        """Dims of a head that turn, at the end where the teacher turns some; 0 turns all."""

        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            return [f"width: {self.width} is odd, and planes have two dims"] if self.width % 2 else []

    turns = True

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        whole = shape.key_dim - shape.key_dim % 2
        self.planes = min(config.width or whole, whole) // 2
        self.heads = shape.kv_heads
        self.way = WAYS.get(shape.rotary, WAYS[HALF])
        self.angles = LowRank(shape.hidden_dim(), config.rank, self.heads, self.planes, tanh=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.angles.start(0.0)

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {"phase": torch.zeros(batch, self.heads, self.planes, dtype=dtype, device=device)}

    def turned(
        self, q: Tensor, k: Tensor, hidden: Tensor, valid: Tensor, docs: Tensor, carried: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        steps = self.angles(hidden)
        phase = running(steps * valid[..., None, None].to(steps.dtype), docs, carried)
        last = phase[:, -1].remainder(2 * math.pi)
        cos, sin = phase.cos(), phase.sin()
        return self._rotated(q, cos, sin), self._rotated(k, cos, sin), last

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        grouped = wide(x.unflatten(2, (self.heads, -1)))
        cos, sin = cos[:, :, :, None], sin[:, :, :, None]
        return self.way.turned(grouped, cos, sin).flatten(2, 3).to(x.dtype)
