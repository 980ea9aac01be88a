"""One token of window softmax and learned linear attention under one normalizer, in place on the state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.window.merge import add_sink, merge
from linearize.kernels.window.reference import Weighted, window_reference
from linearize.kernels.window.turned import turned_back
from linearize.kernels.window_linear.reference import divide, hedgehog


@dataclass(frozen=True)
class Ring:
    """Pinned keys, and the last keys and values of a window, in place on the device; all tensors are written.

    Token n of a row stands in slot n % slots behind the pinned ones. A query sees at most `slots - 1` keys, its own
    included, so the token that comes never takes the slot of the one that leaves. A document's first tokens go among
    the pinned keys and leave their slot empty.

    Attributes:
        k, v: [B, first + slots, N, K], [B, first + slots, N, V].
        valid: [B, first + slots] bool, false on padding and where nothing has been written yet.
        next: [B, H] int64, n of the token that comes next, the same number for each head.
        position: [B, H] int64, valid tokens so far; for a terraced window only, else None.
        block: tokens in a block of a terraced window, 0 for a sliding one.
        limit: most tokens that a query sees, its own included, beside pinned ones; 0 for all that the ring holds.
        first: pinned keys of a document.
        since: [B] int64, tokens of the row's document so far, or None: counted as far as they are pinned.
        turns, most: with `since`, radians a token [R / 2] float64 and the tokens from which pinned keys seem no further
            away: a query turns back by what is more. None where they are as far as they are.
    """

    k: Tensor
    v: Tensor
    valid: Tensor
    next: Tensor
    position: Tensor | None = None
    block: int = 0
    limit: int = 0
    first: int = 0
    since: Tensor | None = None
    turns: Tensor | None = None
    most: int = 0

    @property
    def slots(self) -> int:
        """Of the ring: one more than the keys that a query may see."""
        return self.k.shape[1] - self.first

    def count(self) -> Tensor | None:
        """[B] int64, tokens of the row's document so far, at least as far as they are pinned."""
        if not self.first or self.since is not None:
            return self.since
        return self.valid[:, : self.first].sum(1)


def window_linear_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    *,
    scaling: float,
    ring: Ring | None,
    state: tuple[Tensor, Tensor],
    window_weight: Tensor | None = None,
    linear_weight: Tensor | None = None,
    window_factor: Tensor | None = None,
    complement: bool = False,
    sink: Tensor | None = None,
    softcap: float | None = None,
    valid: Tensor | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
    at_once: bool = False,
) -> Tensor:
    """`window_linear` of one token, which is written into the ring; what leaves the window is added to the sums.

    Triton: one launch (pinned keys: and one that counts), nothing read back, so a CUDA graph can hold it. A terraced
    window hands on the whole block before the last one when a block begins, under a condition on the device.

    Args:
        q: [B, H, K].
        k, v: [B, N, K], [B, N, V].
        query_map, key_map: W, [H, K, f] and [M, K, f], M = H or N.
        scaling: factor on q.k in the window.
        ring: the window, or None for linear attention alone.
        state: sums [B, M, 2 f, V] and norms [B, M, 2 f], float32; written in place.
        window_weight, linear_weight: [H], one by default.
        window_factor: [H], logits of `window_weight`, in place of both: with `complement` the linear branch has the
            rest of the weight, else one. Taken by the kernel itself, so that no launch goes before it.
        sink: [H] logit of a key without a value that every window sees.
        softcap: tanh cap on the window's scaled scores.
        valid: [B] bool, false on padding, which leaves everything as it is; all true by default.
        rotation: cos and sin [B or 1, R] of a rotary embedding that q and k have not had, rotate-half, R <= K.
        at_once: the sums take the token itself before they are read, not what leaves the window (always without one).

    Returns:
        o [B, H, V] in the dtype of v.

    Raises:
        KernelError: Triton is to run what it does not cover.
    """
    assert window_factor is None or (window_weight is None and linear_weight is None), (
        "weights or their logits"
    )
    at_once = at_once or ring is None
    assert ring is None or ring.turns is None or (ring.since is not None and rotation is None)
    if dispatch.use_triton(q, k, v):
        from linearize.kernels.window_linear import triton_step

        sums, norms = state
        held = [None] * 5 if ring is None else [ring.k, ring.v, ring.valid, ring.next, ring.position]
        count = turns = None
        first = most = 0
        if ring is not None:
            count, turns, first, most = ring.count(), ring.turns, ring.first, ring.most
        triton_step.covered(q, k, v, sums, [*held, sums, norms])
        valid = None if valid is None else valid.contiguous()
        cosine, sine = (None, None) if rotation is None else (x.contiguous() for x in rotation)
        block, limit = (0, 0) if ring is None else (ring.block, ring.limit)
        factor = 0 if window_factor is None else 2 if complement else 1
        out: Tensor = triton_step.step(
            q.contiguous(), k.contiguous(), v.contiguous(), valid, cosine, sine, query_map, key_map,
            window_weight if window_factor is None else window_factor, linear_weight, sink, *held, sums, norms,
            count, turns, [float(x) for x in (block, limit, at_once, scaling, softcap or 0.0, factor, first, most)],
        )  # fmt: skip
        _counted(ring, valid)
        return out
    if window_factor is not None:
        window_weight = window_factor.sigmoid()
        linear_weight = 1 - window_weight if complement else None
    return _torch(
        q, k, v, query_map, key_map, scaling, ring, state, window_weight, linear_weight, sink, softcap, valid,
        rotation, at_once,
    )  # fmt: skip


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    scaling: float,
    ring: Ring | None,
    state: tuple[Tensor, Tensor],
    window_weight: Tensor | None,
    linear_weight: Tensor | None,
    sink: Tensor | None,
    softcap: float | None,
    valid: Tensor | None,
    rotation: tuple[Tensor, Tensor] | None,
    at_once: bool,
) -> Tensor:
    dtype, wide = v.dtype, torch.promote_types(q.dtype, torch.float32)
    if rotation is not None:
        q, k = (_rotated(x, *rotation) for x in (q, k))
    here = q.new_ones(q.shape[0], dtype=torch.bool) if valid is None else valid
    q, k, v = (x[:, None].to(wide) for x in (q, k, v))
    arriving = (k, v, here[:, None])
    numerator = denominator = torch.zeros((), dtype=wide, device=q.device)
    if ring is not None:
        leaving, visible = _turn(ring, k, v, here)
        arriving = arriving if at_once else leaving
        near = _read(ring, q, visible, scaling, softcap)
        _counted(ring, here)
        numerator, denominator, _ = near if sink is None else add_sink(near, sink)
    if window_weight is not None:
        share = window_weight.to(wide)
        numerator, denominator = numerator * share[:, None], denominator * share
    sums, norms = state
    phi = hedgehog(arriving[0].to(wide), key_map) * arriving[2][..., None, None].to(wide)
    values = arriving[1].to(wide).repeat_interleave(sums.shape[1] // v.shape[2], 2)
    sums.add_(torch.einsum("bsmf,bsmv->bmfv", phi, values))
    norms.add_(phi.sum(1))
    reader = hedgehog(q, query_map)
    if linear_weight is not None:
        reader = reader * linear_weight.to(wide)[:, None]
    held = [x.repeat_interleave(q.shape[2] // x.shape[1], 1) for x in (sums, norms)]
    numerator = numerator + torch.einsum("bthf,bhfv->bthv", reader, held[0])
    denominator = denominator + torch.einsum("bthf,bhf->bth", reader, held[1])
    return divide(numerator, denominator)[:, 0].to(dtype)


def _counted(ring: Ring | None, here: Tensor | None) -> None:
    if ring is not None and ring.since is not None:
        ring.since.add_(1 if here is None else here)


def _read(ring: Ring, q: Tensor, visible: Tensor, scaling: float, softcap: float | None) -> Weighted:
    """The softmax over what is visible [B, first + slots]."""
    keys, values, first = ring.k.to(q.dtype), ring.v.to(q.dtype), ring.first

    def over(asks: Tensor, kept: slice) -> Weighted:
        seen = visible[:, None, kept]
        return window_reference(asks, keys[:, kept], values[:, kept], seen, scaling=scaling, softcap=softcap)

    if ring.turns is None or ring.since is None:
        return over(q, slice(None))
    turned = turned_back(q, (ring.since[:, None] - ring.most).clamp_min(0), ring.turns)
    return merge(over(q, slice(first, None)), over(turned, slice(first)))


def _turn(ring: Ring, k: Tensor, v: Tensor, here: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Write the token; give keys, values and validity [B, S, ...] that leave, what is visible [B, first + slots]."""
    slots, first = ring.slots, ring.first
    rows = torch.arange(k.shape[0], device=k.device)[:, None]
    slot = (ring.next[:, :1] % slots).clone()
    reach: int | Tensor = slots - 1
    count, begins = 1, torch.ones_like(here[:, None])
    if ring.block and ring.position is not None:
        before = ring.position[:, :1]
        counted = before + here[:, None].to(before.dtype)
        place = (counted - 1).clamp_min(0) % ring.block
        ring.position.copy_(counted.expand_as(ring.position))
        reach = ring.block + place + 1
        count, begins = ring.block, place == 0
    if ring.limit:
        reach = min(reach, ring.limit) if isinstance(reach, int) else reach.clamp(max=ring.limit)
    old = first + (slot + 1 + torch.arange(count, device=k.device)) % slots
    leaving = (ring.k[rows, old], ring.v[rows, old], ring.valid[rows, old] & begins & here[:, None])
    pinned = ring.valid[:, :first].sum(1, keepdim=True)
    ring.valid.scatter_(1, first + slot, False)
    place = torch.where(here[:, None] & (pinned < first), pinned, first + slot)
    ring.k[rows, place], ring.v[rows, place] = k.to(ring.k.dtype), v.to(ring.v.dtype)
    ring.valid.scatter_(1, place, here[:, None])
    ring.next.add_(here[:, None].to(ring.next.dtype))
    age = (slot - torch.arange(slots, device=k.device)) % slots
    near = torch.nn.functional.pad(age < reach, (first, 0), value=True)
    return leaving, ring.valid & near


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    turned, rest = x.split([cosine.shape[-1], x.shape[-1] - cosine.shape[-1]], -1)
    first, second = turned.float().chunk(2, -1)
    across = torch.cat([-second, first], -1)
    turned = turned.float() * cosine[:, None].float() + across * sine[:, None].float()
    return torch.cat([turned.to(x.dtype), rest], -1)
