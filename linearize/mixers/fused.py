"""Compositions that one kernel computes: window softmax and Hedgehog's linear past under one normalizer (LoLCATs).

Found once, when a mixer is built, and here alone. On a device with Triton their chunked and one-token forms are then
`kernels.window_linear`, with q, k and v in the model's own dtype; everywhere else, and for every other composition,
they run part by part, on the kernels of the parts. Both read and write the same state. So it is with a feature map and
an additive rule that `kernels.taylor_linear` computes together (`by_products`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.window_linear import window_linear
from linearize.kernels.window_linear.recurrent import window_linear_step
from linearize.mixers.base import LayerShape, documents
from linearize.mixers.combine import Combine
from linearize.mixers.combine.shared_normalizer import SharedNormalizer
from linearize.mixers.feature_map.hedgehog import Hedgehog
from linearize.mixers.position import Position
from linearize.mixers.recurrent import Recurrent
from linearize.mixers.state import State
from linearize.mixers.update.additive import Additive
from linearize.mixers.window import Window
from linearize.mixers.window.ring import RingWindow

MAP_DIMS = (16, 32, 64, 128)
"""Columns of a feature map's matrix that the kernel takes."""
HEAD_DIM = 256
"""Widest head that the kernel takes."""
NOTHING = 1e-30
"""Share of a window that is off: lost in every sum, and the kernel takes its logarithm."""
PRODUCT_DIMS = (8, 16, 32)
"""Widths of q and k that the kernel of their products' polynomial takes."""


def find(
    shape: LayerShape,
    position: Position,
    window: Window,
    recurrent: Recurrent | None,
    combine: Combine | None,
) -> Fused | None:
    """The parts as one kernel, if it computes the branches and how they are joined."""
    if recurrent is None or max(shape.key_dim, shape.value_dim) > HEAD_DIM or not _is_hedgehog(recurrent):
        return None
    if position.turns:
        return None
    ring = None
    if window.size:
        short = window.shape.sliding_window is not None
        if not isinstance(window, RingWindow) or window.first or window.overlap or shape.softcap is not None:
            return None
        if short and window.limit is not None and window.limit < window.span:
            return None
        joined = isinstance(combine, SharedNormalizer) and not combine.config.stabilized
        if not joined or position.window_rotated != position.recurrent_rotated:
            return None
        ring = window
    rotated = position.window_rotated if window.size else position.recurrent_rotated
    rule = combine if isinstance(combine, SharedNormalizer) else None
    return Fused(shape, ring, recurrent, rule, rotated)


def by_products(recurrent: Recurrent) -> bool:
    """Whether a kernel makes the recurrent branch's features itself, of queries and keys as its map projects them.

    The states are those of the map's own features. The window and the joining rule stay kernels of their own.
    """
    if (
        recurrent.gate is not None
        or not recurrent.update.takes_products
        or recurrent.update.learned is not None
    ):
        return False
    made = recurrent.feature_map.products
    return made is not None and made.dim in PRODUCT_DIMS and recurrent.update.value_dim <= HEAD_DIM


def _is_hedgehog(recurrent: Recurrent) -> bool:
    made = recurrent.feature_map
    return (
        isinstance(made, Hedgehog)
        and made.config.activation == "softmax"
        and made.config.space == "full"
        and made.config.dim in MAP_DIMS
        and type(recurrent.update) is Additive
        and recurrent.update.learned is None
        and recurrent.normalizer.running_sum
        and recurrent.gate is None
        and recurrent.short_conv is None
    )


@dataclass
class Fused:
    """A window, or none, and Hedgehog's linear attention as one operator.

    Attributes:
        shape: the layer's numbers.
        window, recurrent, combine: the mixer's own parts; no window is None.
        rotated: whether the branches see q and k after RoPE.
    """

    shape: LayerShape
    window: RingWindow | None
    recurrent: Recurrent
    combine: SharedNormalizer | None
    rotated: bool

    def runs(self, *tensors: Tensor) -> bool:
        """Whether a call on these tensors goes to the kernel."""
        if dispatch.use_triton(*tensors):  # noqa: SIM103 - exported code, which has no kernels, drops the branch
            return True
        return False

    def chunked(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None,
        docs: Tensor | None,
        state: State | None,
        front: Tensor | None = None,
        sink: Tensor | None = None,
        off: Tensor | None = None,
    ) -> Tensor:
        """`Mixer.chunked` up to the output part, [B, T, H, V] in the dtype of v; q and k as the branches see them.

        Args:
            docs: [B, T] document numbers, or None for one document.
            state: what is carried and is to be written, or None.
            front: [B] padding in front of each row, behind which the state belongs, or None.
            off: [] bool, `Mixer.without_window`. A query that sees nothing without the window still gets its output.
        """
        # under autocast a rotary embedding leaves q and k in float32
        q, k = q.to(v.dtype), k.to(v.dtype)
        window, tokens = self.window, q.shape[1]
        codes = reach = least = None
        span = 0 if window is None else window.span
        ring_k, ring_v, prefix = k, v, 0
        if (
            state is not None
            or valid is not None
            or docs is not None
            or (window is not None and window.has_reach)
        ):
            batch, device = k.shape[0], k.device
            if valid is None:
                valid = torch.ones(batch, tokens, dtype=torch.bool, device=device)
            if docs is None:
                docs = documents(None, batch, tokens, device)
            ring_valid, ring_docs = valid, docs
            if window is not None:
                carried = state
                if carried is None:
                    carried = State(window.initial(batch, k.dtype, device))
                position = window.positions(valid, docs, carried, front)
                reach = window.reach(None if position is None else position[:, span:])
                least = None if reach is None else window.least
                if state is not None:
                    prefix = span
                    ring_k, ring_v, ring_valid, ring_docs = window.behind(state, k, v, valid, docs, front)
                    if reach is not None and position is not None:
                        # a ring is longer than what its queries see: its oldest keys are in the sums
                        ring_valid = ring_valid & ~window.handed_on(position, front)
            codes = torch.where(ring_valid, ring_docs, -1 - ring_docs).to(torch.int32)
            reach = None if reach is None else reach.to(torch.int32)
        query_map, key_map = self._maps()
        past = None if state is None else (state["sums"], state["norms"])
        out, last = window_linear(
            q, ring_k, ring_v, query_map, key_map, window=span, scaling=self.shape.scaling,
            window_weight=self._share(off), linear_weight=self._rest(off), sink=self._sink(sink),
            codes=codes, reach=reach, least=least, prefix=prefix, state=past, return_state=state is not None,
        )  # fmt: skip
        if state is not None:
            if last is not None:
                state.write({"sums": last[0].detach(), "norms": last[1].detach()})
            if window is not None:
                assert docs is not None
                kept = ring_valid[:, tokens:] & (ring_docs[:, tokens:] == docs[:, -1:])
                window.refill(state, ring_k[:, tokens:].detach(), ring_v[:, tokens:].detach(), kept)
        return out

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None,
        state: State,
        sink: Tensor | None = None,
    ) -> Tensor:
        """`Mixer.step` up to the output part, [B, 1, H, V] in the dtype of v, in place on the state."""
        q, k = q.to(v.dtype), k.to(v.dtype)
        query_map, key_map = self._maps()
        out = window_linear_step(
            q[:, 0], k[:, 0], v[:, 0], query_map, key_map, scaling=self.shape.scaling,
            ring=None if self.window is None else self.window.ring(state), state=(state["sums"], state["norms"]),
            sink=self._sink(sink), valid=None if valid is None else valid[:, 0],
            window_factor=None if self.combine is None else self.combine.window_factor,
            complement=self._complement,
        )  # fmt: skip
        return out[:, None]

    def _sink(self, given: Tensor | None) -> Tensor | None:
        return None if self.window is None else self.window.sinks(given)

    def _maps(self) -> tuple[Tensor, Tensor]:
        made = self.recurrent.feature_map
        assert isinstance(made, Hedgehog) and made.query_weight is not None
        key_weight = made.query_weight if made.tied else made.key_weight
        assert key_weight is not None
        return made.query_weight, key_weight

    def _share(self, off: Tensor | None) -> Tensor | None:
        if self.combine is None:
            return None
        share = self.combine.window_factor.sigmoid()
        return share if off is None else torch.where(off, NOTHING, share)

    @property
    def _complement(self) -> bool:
        return self.combine is not None and self.combine.config.complement

    def _rest(self, off: Tensor | None) -> Tensor | None:
        share = self._share(off)
        return 1 - share if self._complement and share is not None else None
