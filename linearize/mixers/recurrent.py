"""The recurrent branch: short convolution, feature map, gate, update rule and normalizer, wired in that order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from linearize.kernels import dispatch
from linearize.mixers.base import LayerShape, Partial, accumulator, positions, repeat_heads, summed
from linearize.mixers.feature_map import FeatureMap
from linearize.mixers.gate import Gate
from linearize.mixers.inputs import Inputs
from linearize.mixers.normalizer import Normalizer
from linearize.mixers.shift import PROJECTIONS, initial, mixed
from linearize.mixers.short_conv import ShortConv
from linearize.mixers.state import State
from linearize.mixers.update import Stream, Update
from linearize.mixers.window import Handed


def _in_parts(state: State | None) -> bool:
    return state is not None and state.in_parts


class Recurrent(nn.Module):
    """Linear attention and its relatives over the keys that the window hands on.

    Args:
        shape: the layer's numbers.
        feature_map, update, normalizer: always there.
        short_conv, gate: or None.
        delayed: keys arrive late, because a window sees them first. There is neither convolution nor gate then:
            `composition_problems` refuses them.
    """

    def __init__(
        self,
        shape: LayerShape,
        feature_map: FeatureMap,
        update: Update,
        normalizer: Normalizer,
        *,
        short_conv: ShortConv | None = None,
        gate: Gate | None = None,
        delayed: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.delayed = shape, delayed
        self.feature_map, self.update, self.normalizer = feature_map, update, normalizer
        self.short_conv, self.gate = short_conv, gate
        update.at_zero = feature_map.at_zero
        if gate is not None:
            update.decay = "feature" if gate.per_feature else "head"
        self.by_products = False
        """Whether Triton's chunked and one-token forms make the features themselves; `fused.by_products` says so."""

    @property
    def uses_hidden(self) -> bool:
        """Whether any part reads the layer's input."""
        return (self.gate is not None and self.gate.uses_hidden) or self.update.uses_hidden

    @property
    def uses_first(self) -> bool:
        """Whether it reads the values of the model's first converted layer."""
        return self.update.first is not None

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Empty tensors of the state."""
        tensors = self.update.initial(batch, accumulator(dtype), device)
        if self.short_conv is not None:
            tensors |= self.short_conv.initial(batch, dtype, device)
        for name, mix in self._mixes():
            tensors[name] = initial(mix, batch, dtype, device)
        if self.feature_map.uses_position:
            tensors["position"] = torch.zeros(batch, dtype=torch.int64, device=device)
        return tensors

    def parallel(self, inputs: Inputs, left: Tensor, rows: slice, *, weights: bool) -> Partial:
        """The definition, for query rows `rows`; `left` [B, R, T] is what the window left to see.

        With `weights` the numerator holds weights [B, R, H, T].
        """
        position = None
        if self.feature_map.uses_position:
            position, _ = positions(inputs.valid, inputs.docs, inputs.docs.new_zeros(inputs.docs.shape[0]))
        stream = self._stream(inputs, position, position, None)
        if self.gate is None and self.update.dense:
            partial = self.update.masked(stream.q[:, rows], stream.k, None if weights else stream.v, left)
        else:
            partial = self.update.weights(stream) if weights else self.update.parallel(stream)
            seen = None if partial.denominator is None else partial.denominator[:, rows]
            partial = Partial(partial.numerator[:, rows], seen)
        return self._normalized(partial, weights)

    def products(self, inputs: Inputs, state: State) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features [B, T, H, F] and [B, T, M, F] and sums of log decays [B, T, M], whose products are the weights where
        the rule `has_factors`; `inputs` come without values, `state` is empty."""
        position = self._advance(inputs, state)
        stream = self._stream(inputs, position, position, state)
        q, k = stream.narrow(stream.q, self.update.keys(stream), grows=True)
        # differences of sums over a text: float32 would leave few digits of the last ones
        total = None if stream.log_decay is None else summed(stream.log_decay.double())
        return q, k, total

    def chunked(
        self,
        inputs: Inputs,
        handed: Handed,
        state: State,
        *,
        fresh: bool = False,
        weights: bool = False,
    ) -> Partial:
        """O(T)-memory form over the keys that leave the window at each token; writes the state.

        Args:
            fresh: the state is empty and nobody looks at it afterwards.
            weights: the values are columns of the identity, see `Mixer.chunked`.
        """
        position = self._advance(inputs, state)
        stream = self._arriving(inputs, handed, position, state, projected=True, weights=weights)
        stream = replace(stream, fresh=fresh, weights=weights)
        order = handed.order
        if order is None:
            state.meet(self.update, stream)
            return self._normalized(self.update.chunked(stream, state), weights)
        # keys that leave in blocks stand in slots of their own, before the queries that may read them
        placed = replace(
            stream,
            q=order.place_queries(stream.q),
            k=order.place_keys(stream.k),
            v=order.place_keys(stream.v),
            docs=order.docs,
            valid=order.place_keys(stream.valid),
        )
        return self._normalized(order.take(self.update.chunked(placed, state)), weights)

    def _normalized(self, partial: Partial, weights: bool) -> Partial:
        return partial if weights and not self.normalizer.signed else self.normalizer(partial)

    def step(self, inputs: Inputs, handed: Handed, state: State) -> Partial:
        """One token, in place."""
        # several keys at once, or none, out of a window come with their features
        one = handed.k.shape[1] == 1
        stream = self._arriving(inputs, handed, self._advance(inputs, state), state, projected=one)
        return self.normalizer(self.update.step(stream, state))

    def _arriving(
        self,
        inputs: Inputs,
        handed: Handed,
        position: Tensor | None,
        state: State,
        *,
        projected: bool,
        weights: bool = False,
    ) -> Stream:
        if not self.delayed:
            return self._stream(inputs, position, position, state, projected=projected, weights=weights)
        wide = inputs.q.dtype
        late = Inputs(
            inputs.q,
            handed.k.to(wide),
            handed.v.to(wide),
            handed.valid,
            inputs.docs,
            inputs.hidden,
            inputs.dtype,
            inputs.front,
        )
        k_position = None
        if position is not None:
            k_position = position - handed.lag if handed.position is None else handed.position
        return self._stream(late, position, k_position, state, projected=projected, weights=weights)

    def _stream(
        self,
        inputs: Inputs,
        position: Tensor | None,
        k_position: Tensor | None,
        state: State | None,
        *,
        projected: bool = False,
        weights: bool = False,
    ) -> Stream:
        # columns of the identity pass what acts on values by
        q, k, v = inputs.q, inputs.k, inputs.v[..., :0] if weights else inputs.v
        docs = inputs.docs if inputs.bordered else None
        masks = {"valid": inputs.valid, "docs": docs, "front": inputs.front}
        own = self._mixed(inputs.hidden, masks, state)
        if self.update.first is not None and v.shape[-1]:  # there are no values where weights are asked for
            assert inputs.first is not None and inputs.hidden is not None
            # as published: what the value projection reads
            v = self.update.first(v, inputs.first, own.get(PROJECTIONS, inputs.hidden))
        if self.short_conv is not None:
            q, k, v = self.short_conv(q, k, v, **masks, state=state)
        v = inputs.v if weights else v
        if dispatch.use_triton(q, k, v) and self.by_products and projected and not _in_parts(state):
            return self._products(inputs, q, k, v)
        seen = inputs.valid[..., None]
        heads = self.update.heads
        phi_k = self.feature_map.key(k, k_position) * seen[..., None].to(k.dtype)
        log_decay = None
        if self.gate is not None:
            # the gate reads the key as it came: Liger's makes it from the projection itself
            log_decay = self.gate(own.get("shift_gate", inputs.hidden), inputs.k)
            log_decay = repeat_heads(log_decay, heads // log_decay.shape[2]) * (
                seen[..., None] if log_decay.dim() == 4 else seen
            ).to(log_decay.dtype)
        return Stream(
            q=self.feature_map.query(q, position),
            k=repeat_heads(phi_k, heads // phi_k.shape[2]),
            v=repeat_heads(v, heads // v.shape[2]),
            docs=inputs.docs,
            valid=inputs.valid,
            log_decay=log_decay,
            hidden=own.get("shift_update", inputs.hidden),
            dtype=inputs.dtype,
        )

    def _mixes(self) -> list[tuple[str, Tensor]]:
        """Name in the state and mix of every part that reads tokens mixed with those before them.

        Inputs of projections are made outside; here stands the mix of the values, which the first layer's share reads.
        """
        parts = (("shift_gate", self.gate), ("shift_update", self.update))
        found = [(name, part.mix) for name, part in parts if part is not None and part.mix is not None]
        inputs = self.update.inputs
        return found if inputs is None else [*found, (PROJECTIONS, inputs.values)]

    def _mixed(self, hidden: Tensor | None, masks: dict[str, Any], state: State | None) -> dict[str, Tensor]:
        """Each part's own mixture [B, T, D]."""
        found = dict(self._mixes())
        return {} if hidden is None or not found else mixed(found, hidden, masks, state)

    def _products(self, inputs: Inputs, q: Tensor, k: Tensor, v: Tensor) -> Stream:
        """q and k before features are made of them; see `Stream.scale`."""
        made = self.feature_map.products
        assert made is not None
        q, k = self.feature_map.projected(q, k)
        k = repeat_heads(k, self.update.heads // k.shape[2])
        return Stream(q, k, v, inputs.docs, inputs.valid, dtype=inputs.dtype, scale=made.scale)

    def _advance(self, inputs: Inputs, state: State) -> Tensor | None:
        """Positions [B, T] of the new tokens for a map that uses them; the count goes on in the state."""
        if not self.feature_map.uses_position:
            return None
        position, seen = positions(inputs.valid, inputs.docs, state["position"])
        state.write({"position": seen})
        return position
