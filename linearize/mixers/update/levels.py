"""Log-linear attention: weights of their own for stretches of the past that double (Guo et al. 2025, arXiv 2506.04761).

What a rule has written is split by when it was written, as a Fenwick tree splits a prefix: near tokens in short
stretches, old ones in long ones, and each query weighs each stretch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.mixers.base import LayerShape, Part, Partial, fill, positions, product
from linearize.mixers.options import number
from linearize.mixers.state import State
from linearize.mixers.update import Stream, Update

EMPTY = -1e4
"""Log decay that leaves nothing of a state, in any dtype that sums are kept in."""


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
    gives less theirs. So every call runs on the rule's own kernels, O(log T) of them over a text, and the state is
    L + 2 states of the rule, of fixed size for any length, where the published one ends at a longest text.
    """

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
            "level_sums": torch.zeros(*size, self.value_dim, dtype=dtype, device=device),
            "seen": torch.zeros(batch, dtype=torch.int64, device=device),
        }
        if self.running_sum and self.sums_weights:
            state["level_norms"] = torch.zeros(size, dtype=dtype, device=device)
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

    def chunked(self, stream: Stream, state: State) -> Partial:
        before, tokens = state["seen"], stream.k.shape[1]
        place, seen = positions(stream.valid, stream.docs, before)
        shares = self.level_shares(stream)
        last, kept = self.levels + 1, {}
        older = (place // (self.block << self.levels) > 0)[..., None].to(shares.dtype) * shares[..., last]
        total: Partial | None = None
        if not stream.fresh or tokens > self.block << self.levels:
            kept[last] = self._level_state(state, last)
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
            kept[level] = self._level_state(state, level)
            made = super().chunked(part, kept[level]).scaled(share)
            total = made if total is None else summed([total, made])
        if not stream.fresh:
            order = [kept[level] for level in range(self.levels + 2)]
            whole = {"level_" + name: torch.stack([each[name] for each in order], 1) for name in order[0]}
            state.write({**whole, "seen": seen})
        assert total is not None
        return total

    def level_step(self, stream: Stream, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """For one token: which levels write [B, L + 2], how the query weighs them [B, L + 2, H], and the log decay
        [B, L + 2, M] or [B, L + 2, M, F] under which a stretch that begins is empty."""
        valid, place = stream.valid[:, :1], state["seen"][:, None]
        level = torch.arange(self.levels + 1, device=place.device)
        spans = self.block << level
        begins = (place % spans == 0) & valid
        # level 0 has no half of its own: it writes and reads always
        second = (place // (spans // 2).clamp_min(1) & 1).to(torch.bool) & (level > 0)
        always = torch.ones_like(valid)
        shares = self.level_shares(stream)[:, 0].transpose(1, 2)
        older = place >= self.block << self.levels
        far = shares[:, -1:] * older[..., None].to(shares.dtype)
        read = torch.cat([second | (level == 0), older], 1)
        shares = torch.cat([shares[:, :-1] - far, far], 1) * read[..., None].to(shares.dtype)
        decay = stream.log_decay
        decay = stream.k.new_zeros(stream.k.shape[:3]) if decay is None else decay
        begins = torch.cat([begins, ~always], 1).view(*read.shape, *[1] * (decay.dim() - 2))
        state["seen"].add_(valid[:, 0])
        return torch.cat([~second, always], 1), shares, torch.where(begins, EMPTY, decay)

    def _level_state(self, state: State, level: int) -> State:
        return State({name[6:]: state[name][:, level] for name in state if name.startswith("level_")})


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


def _stretches(place: Tensor, docs: Tensor, before: Tensor, span: int) -> Tensor:
    """Documents [B, T] that end after every `span` tokens; 0 is the stretch that a state was left in."""
    stretch = torch.cat([(before[:, None] - 1) // span, place // span], 1).diff(dim=1) != 0
    opened = torch.cat([torch.zeros_like(docs[:, :1]), docs], 1).diff(dim=1) != 0
    return (stretch | opened).to(docs.dtype).cumsum(1)
