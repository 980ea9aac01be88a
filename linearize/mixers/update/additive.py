"""The additive rule: S += phi(k) v^T, z += phi(k) (Katharopoulos et al. 2020, eq. 18-20), with or without a decay.

With a decay per head it is RetNet's, Mamba-2's and Lizard's recurrence, per feature GLA's (Yang et al. 2023, eq. 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linearize.kernels import dispatch
from linearize.kernels.gated_linear import (
    GatedState,
    gated_linear_chunk,
    gated_linear_reference,
    gated_linear_step,
)
from linearize.kernels.linear import linear_read, linear_reference
from linearize.mixers.base import LayerShape, Part, Partial, running, wide
from linearize.mixers.options import number
from linearize.mixers.state import State
from linearize.mixers.update import UPDATES, Stream, Transition, Update
from linearize.mixers.update.start import kept_since


@UPDATES.register("additive")
class Additive(Update):
    """Sums of outer products [B, M, F, V] and of features [B, M, F], both float32 or wider; both decay alike.

    With a learned start (`start.LearnedStart`) the kernel that computes window and features at once, and the one that
    makes Taylor features itself, are left for those of the parts.
    """

    decays: ClassVar[tuple[str, ...]] = ("none", "head", "feature")
    dense = True
    takes_products: ClassVar[bool] = True
    NAMES: ClassVar[tuple[str, str]] = ("sums", "norms")

    @dataclass
    class Config(Part.Config):
        start: bool = False
        """Every text begins with a learned state, zero at the start."""
        start_weight: float = number(0.001, above=0, most=1e6)
        """What that state adds to a running sum at the start, times the sum of the query's features."""

    def make(self, shape: LayerShape) -> None:
        if self.config.start:
            self.learn_start(self.config.start_weight)

    def reset_parameters(self) -> None:
        if self.learned is not None:
            self.learned.start()

    @property
    def names(self) -> tuple[str, str]:
        """Of the two sums in the state."""
        return self.NAMES

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        shape = (batch, self.heads, self.feature_dim)
        sums, norms = self.names
        state = {sums: torch.zeros(*shape, self.value_dim, dtype=dtype, device=device)}
        if self.running_sum:
            state[norms] = torch.zeros(shape, dtype=dtype, device=device)
        return state if self.learned is None else state | self.decayed(batch, dtype, device)

    def keys(self, stream: Stream) -> Tensor:
        """What is written: the features of the key."""
        return stream.k

    def bonus(self, dtype: torch.dtype) -> Tensor | None:
        """u [M, F] of rules that read before the token's own key is added, and see that key times u."""
        return None

    def masked(self, q: Tensor, k: Tensor, v: Tensor | None, visible: Tensor) -> Partial:
        numerator, denominator = linear_reference(q, k, v, visible)
        made = Partial(numerator, denominator if self.running_sum else None)
        return made if self.learned is None else self.learned.added(made, q, None, weights=v is None)

    def parallel(self, stream: Stream) -> Partial:
        k = self.keys(stream)
        assert stream.log_decay is not None
        # the state's width follows the values: `weights` sends identity values
        shape = (k.shape[0], self.heads, self.feature_dim)
        empty = (
            k.new_zeros(*shape, stream.v.shape[-1]),
            k.new_zeros(shape) if self.running_sum else None,
        )
        numerator, denominator, _ = gated_linear_reference(
            stream.q,
            k,
            stream.v,
            stream.log_decay,
            stream.docs,
            empty,
            bonus=self.bonus(k.dtype),
            normalize=self.running_sum,
        )
        made = Partial(numerator, denominator)
        left = running(stream.log_decay, stream.docs) if self.learned is not None else None
        return self._begun(made, stream, left)

    def chunked(self, stream: Stream, state: State) -> Partial:
        before = self._state(state)
        if dispatch.use_triton(stream.q, stream.k, stream.v) and stream.scale is not None:
            from linearize.kernels.taylor_linear import taylor_linear_chunk

            q, k, v = stream.narrow(stream.q, stream.k, stream.v, grows=True)
            made = taylor_linear_chunk(
                q,
                k,
                v,
                stream.scale,
                stream.docs,
                stream.valid,
                before,
                normalize=self.running_sum,
            )
            return self._written(state, *made)
        with self.form():
            q, k, v = stream.narrow(stream.q, self.keys(stream), stream.v, grows=True)
            made = gated_linear_chunk(
                q,
                k,
                v,
                stream.decays(),
                stream.docs,
                before,
                bonus=self.bonus(k.dtype),
                normalize=self.running_sum,
            )
        partial = self._written(state, *made)
        left = kept_since(stream.log_decay, stream.docs, state) if self.learned is not None else None
        return self._begun(partial, stream, left)

    def has_factors(self) -> bool:
        own = all(
            getattr(type(self), form) is getattr(Additive, form) for form in ("masked", "parallel", "chunked")
        )
        return own and self.learned is None and self.decay != "feature" and self.bonus(torch.float32) is None

    def transits(self) -> bool:
        return type(self).chunked is Additive.chunked and self.learned is None

    def transition(self, stream: Stream) -> Transition:
        """LASP-2's chunk state (Sun et al. 2025, arXiv 2502.07563, eq. 7 and 8), and what is left of one before it."""
        given = self.keys(stream), stream.v, stream.log_decay, stream.docs
        # made anew in backward: keys times decays are as large as the keys, in float32
        kept, sums, norms = checkpoint(_sums, *given, use_reentrant=False, preserve_rng_state=False)
        added = {"sums": sums, "norms": norms} if self.running_sum else {"sums": sums}
        return Transition(kept, added)

    def step(self, stream: Stream, state: State) -> Partial:
        k = self.keys(stream)
        # the answer is in the dtype of the values, and float16 may not hold a sum
        v = stream.v.float() if stream.v.dtype == torch.float16 else stream.v
        sums, norms = self._state(state)
        if dispatch.use_triton(stream.q, k, stream.v) and stream.scale is not None:
            from linearize.kernels.taylor_linear import taylor_linear_step

            numerator, denominator = taylor_linear_step(
                stream.q[:, 0], k[:, 0], v[:, 0], stream.scale, sums, norms, valid=stream.valid[:, 0]
            )
            return Partial(numerator[:, None], None if denominator is None else denominator[:, None])
        if k.shape[1] == 1:
            decay = None if stream.log_decay is None else stream.log_decay[:, 0]
            with self.form():
                numerator, denominator = gated_linear_step(
                    stream.q[:, 0], k[:, 0], v[:, 0], decay, sums, norms, bonus=self.bonus(k.dtype)
                )
        else:
            # keys of a block, or none, came out of a window
            sums.add_(torch.einsum("btmf,btmv->bmfv", k, stream.v.to(k.dtype)))
            total = sums.new_zeros(sums.shape[:-1]) if norms is None else norms.add_(k.sum(1))
            numerator, denominator = linear_read(stream.q[:, 0], sums, total)
        seen = None if norms is None or denominator is None else denominator[:, None]
        left = kept_since(stream.log_decay, stream.docs, state) if self.learned is not None else None
        return self._begun(Partial(numerator[:, None], seen), stream, left)

    def _begun(self, made: Partial, stream: Stream, left: Tensor | None) -> Partial:
        """With what a learned start adds; `left` [B, T, ...] are the log decays since its document began."""
        if self.learned is None:
            return made
        if left is not None and stream.log_decay is not None and self.bonus(stream.k.dtype) is not None:
            left = left - stream.log_decay.to(left.dtype)
        (q,) = stream.narrow(stream.q, grows=True)
        return self.learned.added(made, q, left, weights=stream.weights)

    def _written(
        self, state: State, numerator: Tensor, denominator: Tensor | None, after: GatedState
    ) -> Partial:
        kept = dict(zip(self.names, after, strict=True))
        state.write({name: value for name, value in kept.items() if value is not None})
        return Partial(numerator, denominator)

    def _state(self, state: State) -> tuple[Tensor, Tensor | None]:
        sums, norms = self.names
        return state[sums], state[norms] if self.running_sum else None


def _sums(k: Tensor, v: Tensor, log_decay: Tensor | None, docs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors [B, M, F or 1] of what came before, and the sums and norms of a text's last document."""
    last = docs[:, -1:]
    seen = (docs == last)[..., None, None]
    whole = (last == 0)[..., None]
    if log_decay is None:
        weighted, kept = wide(k) * seen, whole.to(wide(k).dtype).expand(-1, k.shape[2], 1)
    else:
        decays = wide(log_decay if log_decay.dim() == 4 else log_decay[..., None])
        total = decays.cumsum(1)
        # differences of sums, at most zero: nothing overflows
        weighted = wide(k) * (total[:, -1:] - total).exp() * seen
        kept = total[:, -1].exp() * whole
    return kept, torch.einsum("btmf,btmv->bmfv", weighted, wide(v)), weighted.sum(1)
