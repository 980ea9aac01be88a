"""One token against the ring of a window and its pinned keys: the query reads, then the token takes its slot.

A program owns a query head. Long rings are read by several programs to a key head before (`triton_parts`). The new
token's slot is one that no query reads, and every program has the token in its registers, so whoever writes it needs no
order. Where tokens may be pinned, the slot hangs on how many are, which a last launch settles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels import dispatch, sharing
from linearize.kernels.launch import launch
from linearize.kernels.sharing import parts_of, tile_of
from linearize.kernels.window.operator import covered
from linearize.kernels.window.plan import padded
from linearize.kernels.window.recurrent import Held
from linearize.kernels.window.triton_common import LOG2E, capped
from linearize.kernels.window.triton_parts import join_parts, part_kernel

SHORT = 512
"""Slots of a ring that a query head's own program reads alone."""
NONE = dict.fromkeys(("parts_top", "parts_total", "parts_sums"))


@triton.jit
def read_tile(
    query, keys, values, stood, top, total, sums, scaling, cap, k_stride, v_stride, dims, columns, slot,
    K: tl.constexpr, V: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Keys in the slots `slot`, of which `stood` are seen, added to what the tiles before gave."""
    at = slot.to(tl.int64)[:, None]
    rows = tl.load(keys + at * k_stride + dims[None, :], mask=stood[:, None] & (dims < K)[None, :], other=0.0)
    kept = tl.load(
        values + at * v_stride + columns[None, :], mask=stood[:, None] & (columns < V)[None, :], other=0.0
    )
    score = capped(tl.sum(rows.to(tl.float32) * query[None, :], 1) * scaling, cap, HAS_CAP)
    score = tl.where(stood, score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 0))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    weight = tl.where(stood, tl.exp2((score - safe) * LOG2E), 0.0)
    shrink = tl.exp2((top - safe) * LOG2E)
    total = total * shrink + tl.sum(weight, 0)
    return higher, total, sums * shrink + tl.sum(weight[:, None] * kept.to(tl.float32), 0)


@triton.jit
def step_kernel(
    q, k, v, valid, reach, sink, turned, ring_k, ring_v, ring_valid, counter, parts_top, parts_total, parts_sums, out,
    log_sum, top_out, scaling, cap, span, heads: tl.constexpr, kv_heads: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, FIRST: tl.constexpr, SLOTS: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, W: tl.constexpr,
    P: tl.constexpr, PARTS: tl.constexpr, PP: tl.constexpr, HAS_VALID: tl.constexpr, HAS_REACH: tl.constexpr,
    HAS_SINK: tl.constexpr, HAS_CAP: tl.constexpr, HAS_TURNED: tl.constexpr,
):  # fmt: skip
    """One query head of one row: its answer, and without pinned keys the ring's new entry.

    With PARTS other programs have read the ring, see `triton_parts`.
    """
    head = tl.program_id(0) % heads
    row = (tl.program_id(0) // heads).to(tl.int64)
    group: tl.constexpr = heads // kv_heads
    kv_head = head // group
    dims, columns = tl.arange(0, KP), tl.arange(0, VP)
    k_stride: tl.constexpr = kv_heads * K
    v_stride: tl.constexpr = kv_heads * V
    here = 1
    if HAS_VALID:
        here = tl.load(valid + row).to(tl.int32)
    token = tl.load(counter + row * heads + head)
    slot = (token % SLOTS).to(tl.int32)
    sees = span
    if HAS_REACH:
        sees = tl.load(reach + row).to(tl.int32)
    held: tl.constexpr = FIRST + SLOTS
    keys = ring_k + row * held * k_stride + kv_head * K
    values = ring_v + row * held * v_stride + kv_head * V
    flags = ring_valid + row * held
    query = tl.load(q + (row * heads + head) * K + dims, mask=dims < K, other=0.0).to(tl.float32)
    own_k = tl.load(k + (row * kv_heads + kv_head) * K + dims, mask=dims < K, other=0.0)
    own_v = tl.load(v + (row * kv_heads + kv_head) * V + columns, mask=columns < V, other=0.0)
    # as it will be read from the ring
    near_k, near_v = own_k.to(ring_k.dtype.element_ty), own_v.to(ring_v.dtype.element_ty)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    if HAS_SINK:
        top = tl.load(sink + head).to(tl.float32)
        total += 1.0
    sums = tl.zeros([VP], tl.float32)
    own = capped(tl.sum(near_k.to(tl.float32) * query, 0) * scaling, cap, HAS_CAP)
    own = tl.where(here != 0, own, float("-inf"))
    higher = tl.maximum(top, own)
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    weight = tl.where(here != 0, tl.exp2((own - safe) * LOG2E), 0.0)
    total = total * tl.exp2((top - safe) * LOG2E) + weight
    sums = weight * near_v.to(tl.float32)
    top = higher
    line = row * heads + head
    if PARTS > 0:
        top, total, sums = join_parts(
            parts_top, parts_total, parts_sums, line, top, total, sums, columns, V, PARTS, PP
        )
    else:
        # the slots of the keys that are seen, the newest first; the new token's own is not among them
        for start in range(1, SLOTS, W):
            back = start + tl.arange(0, W)
            at = (slot - back + SLOTS) % SLOTS
            # padding has no slot yet: the last token of the row is one slot back
            stood = (back < SLOTS) & (back + here - 1 < sees)
            at = tl.where(stood, at, 0)
            stood &= tl.load(flags + FIRST + at, mask=stood, other=0).to(tl.int32) != 0
            top, total, sums = read_tile(
                query, keys, values, stood, top, total, sums, scaling, cap, k_stride, v_stride, dims, columns,
                FIRST + at, K, V, HAS_CAP,
            )  # fmt: skip
    if FIRST > 0:
        if HAS_TURNED:
            query = tl.load(turned + (row * heads + head) * K + dims, mask=dims < K, other=0.0).to(tl.float32)
        for start in range(0, FIRST, P):
            at = start + tl.arange(0, P)
            stood = tl.load(flags + at, mask=at < FIRST, other=0).to(tl.int32) != 0
            top, total, sums = read_tile(
                query, keys, values, stood, top, total, sums, scaling, cap, k_stride, v_stride, dims, columns,
                at, K, V, HAS_CAP,
            )  # fmt: skip
    some = total > 0
    sums = sums * tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)
    tl.store(out + line * V + columns, sums.to(out.dtype.element_ty), mask=columns < V)
    tl.store(log_sum + line, tl.where(some, top + tl.log2(tl.where(some, total, 1.0)) / LOG2E, float("-inf")))
    tl.store(top_out + line, tl.where(some, top, 0.0))
    if FIRST == 0:
        tl.debug_barrier()  # every warp has read the counter
        if (head % group == 0) & (here != 0):
            tl.store(keys + tl.cast(slot, tl.int64) * k_stride + dims, near_k, mask=dims < K)
            tl.store(values + tl.cast(slot, tl.int64) * v_stride + columns, near_v, mask=columns < V)
        if (head == 0) & (here != 0):
            tl.store(flags + slot, True)
        tl.store(counter + line, token + here)


@triton.jit
def write_kernel(
    k, v, valid, ring_k, ring_v, ring_valid, counter,
    heads: tl.constexpr, kv_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, FIRST: tl.constexpr,
    SLOTS: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, HP: tl.constexpr, P: tl.constexpr,
    HAS_VALID: tl.constexpr,
):  # fmt: skip
    """One row: the token goes among the pinned keys while there is room, else into the ring."""
    row = tl.program_id(0).to(tl.int64)
    dims, columns, lanes = tl.arange(0, KP), tl.arange(0, VP), tl.arange(0, HP)
    here = 1
    if HAS_VALID:
        here = tl.load(valid + row).to(tl.int32)
    held: tl.constexpr = FIRST + SLOTS
    flags = ring_valid + row * held
    token = tl.load(counter + row * heads)
    ring_slot = FIRST + (token % SLOTS).to(tl.int32)
    pinned = 0
    for start in range(0, FIRST, P):
        at = start + tl.arange(0, P)
        pinned += tl.sum(tl.load(flags + at, mask=at < FIRST, other=0).to(tl.int32), 0)
    slot = tl.where(pinned < FIRST, pinned, ring_slot)
    tl.debug_barrier()  # every warp has counted
    if here != 0:
        for kv_head in range(kv_heads):
            at = (row * held + slot) * kv_heads + kv_head
            own_k = tl.load(k + (row * kv_heads + kv_head) * K + dims, mask=dims < K, other=0.0)
            own_v = tl.load(v + (row * kv_heads + kv_head) * V + columns, mask=columns < V, other=0.0)
            tl.store(ring_k + at * K + dims, own_k.to(ring_k.dtype.element_ty), mask=dims < K)
            tl.store(ring_v + at * V + columns, own_v.to(ring_v.dtype.element_ty), mask=columns < V)
        # a pinned token leaves its place in the ring empty
        tl.store(flags + ring_slot, slot == ring_slot)
        tl.store(flags + slot, True)
        tl.store(counter + row * heads + lanes, token + here + tl.zeros([HP], tl.int64), mask=lanes < heads)


@torch.library.custom_op("linearize::window_step", mutates_args=("ring_k", "ring_v", "ring_valid", "counter"))
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    reach: Tensor | None,
    sink: Tensor | None,
    turned: Tensor | None,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_valid: Tensor,
    counter: Tensor,
    numbers: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """See `recurrent.window_step`; numbers: first, span, scaling, softcap."""
    first, span, scaling, cap = numbers
    first = int(first)
    batch, heads, key_dim = q.shape
    kv_heads, value_dim = v.shape[1:]
    slots = ring_k.shape[1] - first
    out = torch.empty(batch, heads, value_dim, dtype=v.dtype, device=v.device)
    log_sum = torch.empty(batch, heads, dtype=torch.float32, device=q.device)
    top = torch.empty_like(log_sum)
    widest = max(padded(key_dim), padded(value_dim))
    tile = 128 if widest <= 64 else 64 if widest <= 128 else 32
    fixed = {
        "heads": heads, "kv_heads": kv_heads, "K": key_dim, "V": value_dim, "FIRST": first, "SLOTS": slots,
        "KP": padded(key_dim), "VP": padded(value_dim), "HAS_VALID": valid is not None,
    }  # fmt: skip
    pinned = min(tile, padded(max(first, 1)))
    ring = {"ring_k": ring_k, "ring_v": ring_v, "ring_valid": ring_valid, "counter": counter}
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    valid, turned = (None if x is None else x.contiguous() for x in (valid, turned))
    seeing = {
        "q": q,
        "valid": valid,
        "reach": reach,
        "scaling": scaling,
        "cap": cap or 1.0,
        "span": int(span),
    }
    has = {"HAS_REACH": reach is not None, "HAS_CAP": cap > 0}
    parts, found = 0, {}
    if slots > SHORT:
        many = tile_of(widest, ring_k.element_size())
        parts = parts_of(q, batch * kv_heads, slots, many)
        found = {
            f"parts_{name}": q.new_empty(batch, heads, parts, dtype=torch.float32)
            for name in ("top", "total")
        }
        found["parts_sums"] = q.new_empty(batch, heads, parts, value_dim, dtype=torch.float32)
        launch(
            part_kernel, (batch * kv_heads, parts), GP=padded(heads // kv_heads), W=many, PARTS=parts, num_warps=4,
            num_stages=sharing.STAGES, **seeing, **has, **found, **ring, **fixed,
        )  # fmt: skip
    launch(
        step_kernel, (batch * heads,), k=k, v=v, sink=sink, turned=turned, out=out, log_sum=log_sum, top_out=top,
        W=min(tile, padded(slots - 1)), PARTS=parts, PP=padded(max(parts, 1)), HAS_SINK=sink is not None,
        HAS_TURNED=turned is not None, P=pinned, num_warps=4, num_stages=1, **seeing, **has, **(found or NONE), **ring,
        **fixed,
    )  # fmt: skip
    if first:
        launch(
            write_kernel,
            (batch,),
            k=k,
            v=v,
            valid=valid,
            HP=padded(heads),
            P=pinned,
            num_warps=1,
            num_stages=1,
            **ring,
            **fixed,
        )
    return out, log_sum, top


@step.register_fake
def _(q, k, v, valid, reach, sink, turned, ring_k, ring_v, ring_valid, counter, numbers):
    sums = q.new_empty(q.shape[:2], dtype=torch.float32)
    out = torch.empty(*q.shape[:2], v.shape[2], dtype=v.dtype, device=v.device)
    return out, sums, torch.empty_like(sums)


def window_step_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    held: Held,
    *,
    valid: Tensor,
    span: int,
    scaling: float,
    softcap: float | None = None,
    reach: Tensor | None = None,
    sink: Tensor | None = None,
    turned: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in one launch (two with pinned keys), normalized: out, log of the sum, maximum, as `window_triton`."""
    covered(q, k, v)
    tensors = (held.k, held.v, held.valid, held.next)
    dispatch.require(
        "window_step",
        state=(
            all(x.is_contiguous() for x in tensors),
            "a tensor of the state is not contiguous, so it cannot be written in place",
        ),
    )
    out, log_sum, top = step(
        q[:, 0], k[:, 0], v[:, 0], valid[:, 0], None if reach is None else reach[:, 0].contiguous(), sink,
        None if turned is None else turned[:, 0], *tensors, [float(held.first), float(span), scaling, softcap or 0.0],
    )  # fmt: skip
    return out[:, None], log_sum[:, None], top[:, None]
