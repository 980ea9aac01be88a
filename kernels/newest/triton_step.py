"""A program owns a key head of a row and all query heads that share it: a key is read once, and none that is not seen.

Reading keys is what costs: 2 x K x 2 bytes a key head and token, so the loop ends where the row's document begins. With
few rows and many slots several programs share a key head, each with every so-manieth tile, and a second launch joins
what they found.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels import dispatch, sharing
from linearize.kernels.launch import launch
from linearize.kernels.sharing import parts_of, tile_of

LOG2E = tl.constexpr(1.4426950408889634)
WIDEST = 256
"""Columns of a head."""


@triton.jit
def step_kernel(
    q, keys, values, newest, seen, out, tops, totals, scaling, cap,
    N: tl.constexpr, G: tl.constexpr, S: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    GP: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr,
    HAS_CAP: tl.constexpr,
):  # fmt: skip
    """The answers of one key head's queries, oldest tiles last; of PARTS programs sums, their weight and its scale."""
    part = tl.program_id(1)
    head = tl.program_id(0) % N
    row = (tl.program_id(0) // N).to(tl.int64)
    lanes, dims, columns, tile = tl.arange(0, GP), tl.arange(0, KP), tl.arange(0, VP), tl.arange(0, W)
    last = tl.load(newest + row).to(tl.int32)
    count = tl.load(seen + row).to(tl.int32)
    ring_k = keys + (row * N + head) * S * K
    ring_v = values + (row * N + head) * S * V
    line = (row * N + head) * G + lanes
    query = tl.load(
        q + line[:, None] * K + dims[None, :], mask=(lanes < G)[:, None] & (dims < K)[None, :], other=0.0
    )
    top = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    sums = tl.zeros([GP, VP], tl.float32)
    for start in range(part * W, count, PARTS * W):
        age = start + tile
        stood = age < count
        slot = tl.where(stood, (last - age + S) % S, 0)
        near_k = tl.load(
            ring_k + slot[:, None] * K + dims[None, :], mask=stood[:, None] & (dims < K)[None, :], other=0.0
        )
        near_v = tl.load(
            ring_v + slot[:, None] * V + columns[None, :],
            mask=stood[:, None] & (columns < V)[None, :],
            other=0.0,
        )
        score = tl.dot(query, tl.trans(near_k), input_precision="ieee") * scaling
        if HAS_CAP:
            # tanh by exp of a negative number, which does not overflow
            size = tl.exp2(tl.abs(score / cap) * (-2.0 * LOG2E))
            score = tl.where(score < 0, -1.0, 1.0) * cap * (1.0 - size) / (1.0 + size)
        score = tl.where(stood[None, :], score * LOG2E, float("-inf"))
        # every tile that begins has a key that is seen: finite from the first one
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weight, 1)
        near = tl.dot(weight.to(near_v.dtype), near_v, input_precision="ieee")
        sums = sums * shrink[:, None] + near
        top = higher
    here = lanes < G
    if PARTS == 1:
        sums = sums / total[:, None]
    else:
        line = line * PARTS + part
        tl.store(tops + line, top, mask=here)
        tl.store(totals + line, total, mask=here)
    tl.store(
        out + line[:, None] * V + columns[None, :],
        sums.to(out.dtype.element_ty),
        mask=here[:, None] & (columns < V)[None, :],
    )


@triton.jit
def join_kernel(
    sums, tops, totals, out, V: tl.constexpr, VP: tl.constexpr, PARTS: tl.constexpr, PP: tl.constexpr
):
    """One query head's answer from what PARTS programs found; the first has seen the newest key."""
    line = tl.program_id(0).to(tl.int64)
    parts, columns = tl.arange(0, PP), tl.arange(0, VP)
    place = line * PARTS + parts
    top = tl.load(tops + place, mask=parts < PARTS, other=float("-inf"))
    weight = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(weight * tl.load(totals + place, mask=parts < PARTS, other=0.0), 0)
    found = tl.load(
        sums + place[:, None] * V + columns[None, :],
        mask=(parts < PARTS)[:, None] & (columns < V)[None, :],
        other=0.0,
    )
    answer = tl.sum(weight[:, None] * found, 0) / total
    tl.store(out + line * V + columns, answer.to(out.dtype.element_ty), mask=columns < V)


def covered(q: Tensor, keys: Tensor, values: Tensor) -> None:
    """Refuse what the kernel does not cover. Raises KernelError."""
    widest = max(keys.shape[3], values.shape[3])
    dispatch.require(
        "newest_step",
        width=(widest <= WIDEST, f"heads of {widest} columns, and {WIDEST} is the most"),
        dtype=(q.dtype == keys.dtype == values.dtype, f"{q.dtype}, {keys.dtype} and {values.dtype} differ"),
        layout=(keys.is_contiguous() and values.is_contiguous(), "keys or values are not contiguous"),
    )


@torch.library.custom_op("linearize::newest_step", mutates_args=())
def step(
    q: Tensor, keys: Tensor, values: Tensor, newest: Tensor, seen: Tensor, numbers: list[float]
) -> Tensor:
    """See `recurrent.newest_step`; numbers: scaling, softcap or 0."""
    scaling, cap = numbers
    batch, heads, key_dim = q.shape
    held, slots, value_dim = values.shape[1:]
    out = torch.empty(batch, heads, value_dim, dtype=values.dtype, device=q.device)
    widths = [max(16, triton.next_power_of_2(x)) for x in (heads // held, key_dim, value_dim)]
    tile = tile_of(max(widths[1:]), keys.element_size())
    parts = parts_of(q, batch * held, slots, tile)
    size = (batch, heads, parts) if parts > 1 else (0,)
    tops, totals = (torch.empty(size, dtype=torch.float32, device=q.device) for _ in range(2))
    found = out if parts == 1 else out.new_empty(*size, value_dim, dtype=torch.float32)
    launch(
        step_kernel, (batch * held, parts), q=q, keys=keys, values=values, newest=newest, seen=seen, out=found,
        tops=tops, totals=totals, scaling=scaling, cap=cap or 1.0, N=held, G=heads // held, S=slots, K=key_dim,
        V=value_dim, GP=widths[0], KP=widths[1], VP=widths[2], W=tile, PARTS=parts, HAS_CAP=cap > 0, num_warps=4,
        num_stages=sharing.STAGES,
    )  # fmt: skip
    if parts > 1:
        launch(
            join_kernel, (batch * heads,), sums=found, tops=tops, totals=totals, out=out, V=value_dim, VP=widths[2],
            PARTS=parts, PP=triton.next_power_of_2(parts), num_warps=1, num_stages=1,
        )  # fmt: skip
    return out


@step.register_fake
def _(q, keys, values, newest, seen, numbers):
    return torch.empty(*q.shape[:2], values.shape[3], dtype=values.dtype, device=q.device)
