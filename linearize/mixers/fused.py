"""Compositions that one kernel computes: window softmax and Hedgehog's linear past under one normalizer (LoLCATs).

Found once, when a mixer is built, and here alone. On a device with Triton their chunked and one-token forms are then
`kernels.window_linear`, with q, k and v in the model's own dtype; everywhere else, and for every other composition,
they run part by part, on the kernels of the parts. Both read and write the same state. So it is with a feature map and
an additive rule that `kernels.taylor_linear` computes together (`by_products`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.window_linear import Pins, window_linear
from linearize.kernels.window_linear.recurrent import window_linear_step
from linearize.kernels.window_linear.sizes import CHUNK, MOST_PINS
from linearize.mixers.base import LayerShape, documents
from linearize.mixers.beside import Plain
from linearize.mixers.combine import Combine
from linearize.mixers.combine.shared_normalizer import SharedNormalizer
from linearize.mixers.feature_map.hedgehog import Hedgehog
from linearize.mixers.given import Given
from linearize.mixers.normalizer.running_sum import RunningSum
from linearize.mixers.position import Position
from linearize.mixers.recurrent import Recurrent
from linearize.mixers.state import State
from linearize.mixers.update.additive import Additive
from linearize.mixers.window import Window
from linearize.mixers.window.ring import RingWindow
from linearize.mixers.window.runs import Line

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
        if not isinstance(window, RingWindow) or window.overlap or shape.softcap is not None:
            return None
        if window.first > MOST_PINS:
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
        and type(recurrent.normalizer) is RunningSum  # `bounded` keeps a sum as well, and divides by another
        and recurrent.gate is None
        and recurrent.short_conv is None
    )


def _codes(valid: Tensor, docs: Tensor) -> Tensor:
    return torch.where(valid, docs, -1 - docs).to(torch.int32)


@dataclass
class _Seen:
    """The keys of one call, as `window_linear` wants them.

    Attributes:
        line: what is carried and the new tokens.
        codes, reach, least, pins: see `window_linear`.
        pinned, count: see `Line.pinned_from` and `Far.counts`.
    """

    line: Line
    codes: Tensor | None
    reach: Tensor | None = None
    least: int | None = None
    pins: Pins | None = None
    pinned: Tensor | None = None
    count: Tensor | None = None


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
        self, pair: Plain, given: Given, state: State | None, front: Tensor | None, off: Tensor | None
    ) -> Tensor:
        """`Mixer.run` up to the output part, [B, T, H, V] in the dtype of v.

        Args:
            pair: q [B, T, H, K] and k [B, T, N, K] as the branches see them.
            given, state, front: see `Mixer.run`.
            off: [] bool, `Mixer.without_window`. A query that sees nothing without the window still gets its output.
        """
        _, _, v, valid, docs, beside = given
        # under autocast a rotary embedding leaves q and k in float32
        q, k = pair[0].to(v.dtype), pair[1].to(v.dtype)
        seen = self._seen(Given(q, k, v, valid, docs), state, front)
        query_map, key_map = self._maps()
        past = None if state is None else (state["sums"], state["norms"])
        out, last = window_linear(
            q, seen.line.k, seen.line.v, query_map, key_map, window=0 if self.window is None else self.window.span,
            scaling=self.shape.scaling, window_weight=self._share(off), linear_weight=self._rest(off),
            sink=self._sink(beside.sink), codes=seen.codes, reach=seen.reach, least=seen.least, prefix=seen.line.prefix,
            state=past, return_state=state is not None, pins=seen.pins,
        )  # fmt: skip
        if state is not None:
            if last is not None:
                state.write({"sums": last[0].detach(), "norms": last[1].detach()})
            if self.window is not None:
                line = replace(seen.line, k=seen.line.k.detach(), v=seen.line.v.detach())
                self.window.keep(line, state, seen.pinned, seen.count)
        return out

    def _seen(self, given: Given, state: State | None, front: Tensor | None) -> _Seen:
        """The keys of a call and who sees them; without masks where nothing is masked."""
        q, k, v, valid, docs, _ = given
        window, (batch, tokens), device = self.window, k.shape[:2], k.device
        ringed = window is not None and (window.has_reach or window.first > 0)
        whole = valid is None and docs is None
        plain = state is None and whole and not ringed
        valid = torch.ones(batch, tokens, dtype=torch.bool, device=device) if valid is None else valid
        docs = documents(None, batch, tokens, device) if docs is None else docs
        if plain or window is None:
            line = Line(k, v, valid, docs, 0)
            return _Seen(line, None if plain else _codes(line.valid, docs))
        carried = state
        if carried is None:
            carried = State(window.initial(batch, k.dtype, device) if window.has_reach else {})
        position = window.positions(valid, docs, carried, front)
        reach = window.reach(None if position is None else position[:, window.span :])
        # kernels for windows of whole chunks want whole chunks in front of them, too
        lead = -window.first % CHUNK if reach is None and window.span % CHUNK == 0 else 0
        line, pinned = window.line(state, k, v, valid, docs, front, lead, whole=whole)
        if state is not None and reach is not None and position is not None:
            # a ring is longer than what its queries see: its oldest keys are in the sums
            before = line.prefix - window.span
            gone = torch.nn.functional.pad(window.handed_on(position, front), (before, 0), value=False)
            line.valid = line.valid & ~(gone & line.in_ring())
        made = _Seen(line, _codes(line.valid, line.docs), pinned=pinned)
        if reach is not None:
            made.reach, made.least = reach.to(torch.int32), window.least
        if pinned is not None:
            made.count, asking = window.counts(state, line, pinned), None
            if made.count is not None and window.far is not None:
                asking = window.far.turned_back(q, made.count)
            past = _codes(line.in_past(pinned), line.docs)
            made.pins = Pins(window.first, pinned.to(torch.int32), past, asking)
        return made

    def step(self, pair: Plain, given: Given, state: State) -> Tensor:
        """`Mixer.step` up to the output part, [B, 1, H, V] in the dtype of v, in place on the state.

        Args:
            pair: q [B, 1, H, K] and k [B, 1, N, K] as the branches see them.
            given, state: see `Mixer.step`.
        """
        v, valid = given.v, given.valid
        q, k = pair[0].to(v.dtype), pair[1].to(v.dtype)
        query_map, key_map = self._maps()
        out = window_linear_step(
            q[:, 0], k[:, 0], v[:, 0], query_map, key_map, scaling=self.shape.scaling,
            ring=None if self.window is None else self.window.ring(state), state=(state["sums"], state["norms"]),
            sink=self._sink(given.beside.sink), valid=None if valid is None else valid[:, 0],
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
