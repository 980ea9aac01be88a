"""Log-linear attention: weights of their own for stretches of the past that double (Guo et al. 2025, arXiv 2506.04761).

What a rule has written is split by when it was written, as a Fenwick tree splits a prefix: near tokens in short
stretches, old ones in long ones, and each query weighs each stretch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.kernels.stretches import Stretches, carry, stretches_chunk, widest
from linearize.mixers.base import LayerShape, Part, Partial, fill, positions, product
from linearize.mixers.options import number
from linearize.mixers.state import State
from linearize.mixers.update import Stream, Update

Given = tuple[Tensor, Tensor, Tensor, Tensor | None]


@dataclass
class LevelOptions(Part.Config):
    """Options of every rule with levels."""

    levels: int = number(10, least=1, most=24)
    """L: stretches that double, beside the block at hand and all that is older."""
    block: int = number(1, least=1, most=4096)
    """Tokens in the shortest stretch; 1 as published."""

    def level_problems(self) -> list[str]:
        """Rules that types alone do not express."""
        found = []
        if self.block & (self.block - 1):
            found.append(f"block: {self.block} is no power of two, which stretches are")
        if getattr(self, "start", False):
            found.append("start: a learned start was written at no time, and so has no level; leave it out")
        return found


class Levels(Update):
    """Mixed into a rule R that is linear in what it writes: o_t = sum_l lambda_t^l R(what was written on level l).

    Token t of a document is in block b_t = t // block. Level 0 holds what was written in block b_t itself; level l = 1
    ... L, where bit l - 1 of b_t is set, the 2^(l - 1) blocks before those that the lower bits count; level L + 1 all
    that is older. lambda = softplus(bias + x W) for each query head, one at the start, where it is the rule itself.

    Each level is a call of the rule itself, whose documents are pairs of stretches: the first of a pair writes, the
    second reads, and both take away what the rule takes away. What is older than all levels is what the whole rule
    gives less theirs. So every call runs on the rule's own kernels, O(log T) of them over a text. Where `joined` is
    true, a text is read by `kernels.stretches` in one chain of launches whatever its length, but for decays of each
    feature, running sums, and heads wider than 128 (in float32: 64).

    The state is L + 2 states of the rule, one a level, of fixed size for any length, where the published one ends at a
    longest text. Levels whose bit is not set are zero; a token that begins a block first carries all levels that are
    full into the next, as a counter does. So one token reads and writes the levels that hold something, half of them
    in the mean.
    """

    joined: ClassVar[bool] = True
    """Whether all levels of a text are read together, where they can be; false: one after the other, by the rule, for
    comparison (`linearize bench kernels --only log_linear log_linear_delta`)."""

    def make_levels(self, config: Any, shape: LayerShape) -> None:
        """The weights, without values."""
        self.levels, self.block = config.levels, config.block
        self.level_weight = nn.Parameter(torch.empty(shape.hidden_dim(), shape.heads * (self.levels + 2)))
        self.level_bias = nn.Parameter(torch.empty(shape.heads, self.levels + 2))

    def reset_levels(self) -> None:
        """Every weight at one."""
        fill(self.level_weight, 0.0)
        fill(self.level_bias, math.log(math.e - 1))

    def without(self, stream: Stream, written: Tensor) -> Stream:
        """The same, of which only tokens with `written` [B, T, 1, 1] are written."""
        raise NotImplementedError(type(self))  # pragma: no cover - both rules define it

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        size = (batch, self.levels + 2, self.heads, self.feature_dim)
        state = {
            "stretch_sums": torch.zeros(*size, self.value_dim, dtype=dtype, device=device),
            "seen": torch.zeros(batch, dtype=torch.int64, device=device),
        }
        if self.running_sum and self.sums_weights:
            state["stretch_norms"] = torch.zeros(size, dtype=dtype, device=device)
        return state

    def level_shares(self, stream: Stream) -> Tensor:
        """lambda [B, T, H, L + 2]."""
        assert stream.hidden is not None
        logits = product(stream.hidden, self.level_weight).unflatten(-1, self.level_bias.shape)
        return F.softplus(logits + self.level_bias.to(logits.dtype))

    def parallel(self, stream: Stream) -> Partial:
        """The weights of the rule, each times that of the level on which its key lies."""
        if stream.log_decay is None:
            stream = replace(stream, log_decay=stream.k.new_zeros(stream.k.shape[:3]))
        tokens, batch = stream.k.shape[1], stream.k.shape[0]
        eye = torch.eye(tokens, dtype=stream.q.dtype, device=stream.q.device)
        values = eye[None, :, None].expand(batch, -1, self.heads, -1)
        rule = super().parallel(replace(stream, v=values, weights=True)).numerator
        place, _ = positions(stream.valid, stream.docs, stream.docs.new_zeros(batch))
        block = place // self.block
        apart = block[:, :, None] ^ block[:, None]
        level = sum(((apart >> bit) > 0).to(torch.int64) for bit in range(self.levels + 1))
        shares = self.level_shares(stream)
        weights = rule * shares.gather(3, level[:, :, None].expand(-1, -1, shares.shape[2], -1))
        total = weights.sum(-1) if self.running_sum and self.sums_weights else None
        if stream.weights:
            return Partial(weights, total)
        shared = stream.v.repeat_interleave(weights.shape[2] // stream.v.shape[2], 2)
        return Partial(torch.einsum("bths,bshv->bthv", weights, shared), total)

    def given(self, stream: Stream) -> Given:
        """q, k, v and, of the delta rule, beta, as the kernels take them."""
        raise NotImplementedError(type(self))  # pragma: no cover - both rules define it

    def chunked(self, stream: Stream, state: State) -> Partial:
        by_feature = stream.log_decay is not None and stream.log_decay.dim() == 4
        if self.joined and not by_feature and not (self.running_sum and self.sums_weights):
            given = self.given(stream)
            if max(self.feature_dim, stream.v.shape[-1]) <= widest(given[0].dtype):
                return self._together(stream, given, state)
        return self._apart(stream, state)

    def _together(self, stream: Stream, given: Given, state: State) -> Partial:
        before, tokens = state["seen"], stream.k.shape[1]
        place, seen = positions(stream.valid, stream.docs, before)
        levels, older, carried = self.levels + 1, True, None
        if stream.fresh:
            older = tokens > self.block << self.levels
            if not older:
                levels = 1 + sum(self.block << level < tokens for level in range(self.levels))
        else:
            kept = self._running(state, before, fresh=False)
            carried = torch.stack([each["sums"] for each in kept], 1)
        out, after = stretches_chunk(
            *given,
            stream.log_decay,
            self.level_shares(stream),
            place,
            stream.docs,
            Stretches(self.block, levels, older),
            before,
            carried,
        )
        if after is not None:
            kept = [State({"sums": each}) for each in after.unbind(1)]
            state.write({**self._settled(kept, seen), "seen": seen})
        return Partial(out, None)

    def _apart(self, stream: Stream, state: State) -> Partial:
        before, tokens = state["seen"], stream.k.shape[1]
        place, seen = positions(stream.valid, stream.docs, before)
        shares = self.level_shares(stream)
        last, kept = self.levels + 1, self._running(state, before, fresh=stream.fresh)
        older = (place // (self.block << self.levels) > 0)[..., None].to(shares.dtype) * shares[..., last]
        total: Partial | None = None
        if not stream.fresh or tokens > self.block << self.levels:
            total = super().chunked(stream, kept[last]).scaled(older)
        for level in range(last):
            half = self.block << max(level - 1, 0)
            if stream.fresh and level and half >= tokens:
                break
            docs = _stretches(place, stream.docs, before, self.block << level)
            part, share = replace(stream, docs=docs), shares[..., level]
            share = share if total is None else share - older
            if level:
                reads = (place // half & 1).to(torch.bool)
                part = self.without(part, ~reads[..., None, None])
                share = share * reads[..., None].to(share.dtype)
            made = super().chunked(part, kept[level]).scaled(share)
            total = made if total is None else summed([total, made])
        if not stream.fresh:
            state.write({**self._settled(kept, seen), "seen": seen})
        assert total is not None
        return total

    def level_step(self, stream: Stream, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """For one token, whose block is carried: which levels hold something [B, L + 2], how the query weighs them
        [B, L + 2, H], and the log decay [B, L + 2, M] or [B, L + 2, M, F]. It is written on level 0."""
        valid, place = stream.valid[:, 0], state["seen"]
        block, level = place // self.block, torch.arange(self.levels + 1, device=place.device)
        begins = valid & (place % self.block == 0) & (place > 0)
        lowest = block & -block
        full = (lowest[:, None] >> level[1:] > 0).sum(1) + 1
        for name in self._stretch_names(state):
            carry(state[name], torch.where(begins, full, 0))
        held = self._holds(block)
        shares = self.level_shares(stream)[:, 0].transpose(1, 2)
        decay = stream.log_decay
        decay = stream.k.new_zeros(stream.k.shape[:3]) if decay is None else decay
        state["seen"].add_(valid)
        return (
            held,
            shares * held[..., None].to(shares.dtype),
            decay.expand(-1, len(level) + 1, *decay.shape[2:]),
        )

    def _holds(self, block: Tensor) -> Tensor:
        """Which levels [B, L + 2] hold something while block `block` [B] is written."""
        level = torch.arange(self.levels, device=block.device)
        bits = (block[:, None] >> level & 1).to(torch.bool)
        first = (
            torch.ones_like(bits[:, :1]) if self.levels else torch.ones_like(block[:, None], dtype=torch.bool)
        )
        return torch.cat([first, bits, (block >> self.levels > 0)[:, None]], 1)

    def _stretch_names(self, state: State) -> list[str]:
        return [name for name in ("stretch_sums", "stretch_norms") if name in state]

    def _running(self, state: State, before: Tensor, *, fresh: bool) -> list[State]:
        """For each level the state of its call: what its pair of stretches has written so far; last, of all levels."""
        names = self._stretch_names(state)
        if fresh:  # all are empty
            return [
                State({name[8:]: state[name][:, level] for name in names}) for level in range(self.levels + 2)
            ]
        second = self._holds((before - 1) // self.block)
        made: list[dict[str, Tensor]] = [{} for _ in range(self.levels + 2)]
        for name in names:
            below = torch.zeros_like(state[name][:, 0])
            for level in range(self.levels + 2):
                own = state[name][:, level]
                whole = level in (0, self.levels + 1)
                reads = second[:, level].view(-1, *[1] * (own.dim() - 1))
                made[level][name[8:]] = below + own if whole else torch.where(reads, own, below)
                below = below + own
        return [State(each) for each in made]

    def _settled(self, kept: list[State], seen: Tensor) -> dict[str, Tensor]:
        """Of the calls' states, behind `seen` [B] tokens, what each level holds."""
        held, found = self._holds((seen - 1) // self.block), {}
        for name in kept[0]:
            *near, whole = (each[name] for each in kept)
            shape = (*held.shape, *[1] * (whole.dim() - 1))
            levels = torch.where(held.view(shape)[:, :-1], torch.stack(near, 1), 0)
            far = torch.where(held.view(shape)[:, -1], whole - levels.sum(1), 0)
            found["stretch_" + name] = torch.cat([levels, far[:, None]], 1)
        return found


def summed(parts: list[Partial]) -> Partial:
    """Of several states, each read under the query: numerators and, where there are any, denominators add up."""
    total = parts[0]
    for part in parts[1:]:
        weights = None
        if total.denominator is not None and part.denominator is not None:
            weights = total.denominator + part.denominator
        total = Partial(total.numerator + part.numerator, weights)
    return total


def each_level(x: Tensor, levels: int) -> Tensor:
    """[B, M, ...] -> [B, levels M, ...], the same on every level."""
    return x[:, None].expand(-1, levels, *x.shape[1:]).flatten(1, 2)


def on_first(x: Tensor, levels: int) -> Tensor:
    """[B, M, ...] -> [B, levels M, ...], on level 0 and zero on all others."""
    return torch.cat([x, x.new_zeros(len(x), (levels - 1) * x.shape[1], *x.shape[2:])], 1)


def each_head(held: Tensor, heads: int) -> Tensor:
    """[B, L + 2] -> [B, heads] of all levels."""
    return held.repeat_interleave(heads // held.shape[1], 1)


def _stretches(place: Tensor, docs: Tensor, before: Tensor, span: int) -> Tensor:
    """Documents [B, T] that end after every `span` tokens; 0 is the stretch that a state was left in."""
    stretch = torch.cat([(before[:, None] - 1) // span, place // span], 1).diff(dim=1) != 0
    opened = torch.cat([torch.zeros_like(docs[:, :1]), docs], 1).diff(dim=1) != 0
    return (stretch | opened).to(docs.dtype).cumsum(1)
