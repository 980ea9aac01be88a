"""Sparse state expansion: more states than a token touches (SSE, Pan et al. 2025, arXiv 2507.16577)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from linearize.kernels.gated_linear import gated_linear_step
from linearize.mixers.base import LayerShape, Partial, product
from linearize.mixers.options import number
from linearize.mixers.state import State
from linearize.mixers.update import UPDATES, Stream
from linearize.mixers.update.additive import Additive
from linearize.mixers.update.levels import each_level, summed
from linearize.mixers.update.sorting import Places, running_count


@UPDATES.register("sse")
class SparseStates(Additive):
    """`additive` on N + 1 states: one that every token writes and reads, and N of which each token takes its top K.

    p = softmax(x E) over the N states, shared by all heads. Token t writes p_ti k_t v_t^T into the states i among its K
    largest p, lets them decay, reads them under p_ti q_t, and leaves the others as they are; what they answer is added
    to what the first state does. Parameters do not grow with N but for E [D, N]. Where no state comes in and none is
    asked for, as in training, tokens are sorted by the state that they take, whose stretch is a document of its own: a
    text is read K + 1 times, by the rule's own kernels. Elsewhere each state is a call of the rule of which the tokens
    that do not take it are padding, N + 1 times.

    Limitations: the states share features and decays, for which the published layer has low-rank additions to queries
    and keys and a gate of their own; no loss evens out how often states are chosen, as its training does; which state
    is chosen has no gradient, only how much.
    """

    decays: ClassVar[tuple[str, ...]] = ("none", "head", "feature")
    dense = False
    takes_products: ClassVar[bool] = False
    uses_hidden = True

    SPREAD = 0.01
    """Of the weights at the start: enough to tell the states apart."""

    @dataclass
    class Config(Additive.Config):
        states: int = number(4, least=2, most=64)
        """N, beside the one that all tokens share."""
        active: int = number(1, least=1, most=63)
        """K."""

        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            found = []
            if self.active >= self.states:
                found.append(f"active: {self.active} of {self.states} states would be all; it must be less")
            if self.start:
                found.append("start: a learned start belongs to one state; leave it out")
            return found

    def make(self, shape: LayerShape) -> None:
        super().make(shape)
        self.states, self.active = self.config.states, self.config.active
        self.choice = nn.Parameter(torch.empty(shape.hidden_dim(), self.states))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.uniform_(self.choice, -self.SPREAD, self.SPREAD)

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        each = super().initial(batch, dtype, device)
        return {
            f"state_{name}": x[:, None].repeat(1, self.states + 1, *[1] * (x.dim() - 1))
            for name, x in each.items()
        }

    def weighed(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """p [B, T, N] of all states, and which [B, T, K] the token takes."""
        assert stream.hidden is not None
        found = product(stream.hidden, self.choice).softmax(-1)
        return found, found.topk(self.active, -1).indices

    def shares(self, stream: Stream) -> Tensor:
        """[B, T, N + 1]: p of each state that the token takes, zero of the others, and one of the shared state."""
        found, taken = self.weighed(stream)
        chosen = torch.zeros_like(found).scatter(-1, taken, 1.0)
        return torch.cat([torch.ones_like(found[..., :1]), found * chosen], -1)

    def parallel(self, stream: Stream) -> Partial:
        if stream.log_decay is None:
            stream = replace(stream, log_decay=stream.k.new_zeros(stream.k.shape[:3]))
        made = [super(SparseStates, self).parallel(part) for part in self._parts(stream)]
        return summed(made)

    def chunked(self, stream: Stream, state: State) -> Partial:
        if stream.fresh:
            first, second = (self._state_of(state, i) for i in range(2))
            return summed([super().chunked(stream, first), self._sorted(stream, second)])
        made, kept = [], []
        for i, part in enumerate(self._parts(stream)):
            kept.append(self._state_of(state, i))
            made.append(super().chunked(part, kept[-1]))
        if not stream.fresh:
            state.write({f"state_{name}": torch.stack([each[name] for each in kept], 1) for name in kept[0]})
        return summed(made)

    def _sorted(self, stream: Stream, empty: State) -> Partial:
        """What the N states answer, by one call in which each has a stretch; `empty` is a state of the rule."""
        found, taken = self.weighed(stream)
        places = Places.of(taken, self.states)
        share, docs = places.sort(found.gather(-1, taken).flatten(1), copies=True), places.sort(stream.docs)
        owner = places.sort(taken.flatten(1), copies=True)
        border = (docs.diff(dim=1) != 0) | (owner.diff(dim=1) != 0)
        q, k = (places.sort(x) * share[..., None, None].to(x.dtype) for x in (stream.q, stream.k))
        part = replace(
            stream,
            q=q,
            k=k,
            v=places.sort(stream.v),
            docs=torch.cat([torch.zeros_like(docs[:, :1]), running_count(border)], 1),
            valid=places.sort(stream.valid),
            log_decay=None if stream.log_decay is None else places.sort(stream.log_decay),
        )
        made = super().chunked(part, empty)
        sums = None if made.denominator is None else places.back(made.denominator)
        return Partial(places.back(made.numerator), sums)

    def _state_of(self, state: State, i: int) -> State:
        return State({name[6:]: state[name][:, i] for name in state if name.startswith("state_")})

    def step(self, stream: Stream, state: State) -> Partial:
        count, shares = self.states + 1, self.shares(stream)[:, 0, :, None, None]
        # the answer is in the dtype of the values, and float16 may not hold a sum
        v = stream.v.float() if stream.v.dtype == torch.float16 else stream.v
        q, k = (x * shares.to(x.dtype) for x in (stream.q, stream.k))
        norms = state["state_norms"].flatten(1, 2) if self.running_sum else None
        decay = stream.log_decay
        if decay is not None:
            taken = (shares != 0).view(len(shares), count, *[1] * (decay.dim() - 2))
            decay = (decay * taken.to(decay.dtype)).flatten(1, 2)
        with self.form():
            numerator, denominator = gated_linear_step(
                q.flatten(1, 2),
                k.flatten(1, 2),
                each_level(v[:, 0], count),
                decay,
                state["state_sums"].flatten(1, 2),
                norms,
            )
        total = None if denominator is None else denominator.unflatten(1, (count, -1)).sum(1)[:, None]
        return Partial(numerator.unflatten(1, (count, -1)).sum(1)[:, None], total)

    def _parts(self, stream: Stream) -> Iterator[Stream]:
        """What each state sees: the shared one first."""
        shares = self.shares(stream)
        yield stream
        for i in range(1, self.states + 1):
            share = shares[..., i, None]
            decay = stream.log_decay
            if decay is not None:
                taken = (share != 0).view(*share.shape, *[1] * (decay.dim() - 3))
                decay = decay * taken.to(decay.dtype)
            q, k = (x * share[..., None].to(x.dtype) for x in (stream.q, stream.k))
            yield replace(stream, q=q, k=k, log_decay=decay)
