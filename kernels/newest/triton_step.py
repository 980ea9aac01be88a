"""A program owns a key head of a row and all queries that share it: a key is read once, and none that is not seen.

The queries are those of all query heads and, where several tokens come at once, of all of these: a few share the tile
that one would leave empty.

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
SUMS = 8192
"""Numbers that the answers of a program's queries may be."""
SCORES = 4096
"""Scores in a tile at most: with more, registers spill on sm_80."""


@triton.jit
def step_kernel(
    q, keys, values, newest, seen, out, tops, totals, scaling, cap,
    N: tl.constexpr, G: tl.constexpr, T: tl.constexpr, S: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    GP: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr,
    HAS_CAP: tl.constexpr,
):  # fmt: skip
    """The answers of one key head's queries, oldest tiles last; of PARTS programs sums, their weight and its scale."""
    part = tl.program_id(1)
    head = tl.program_id(0) % N
    row = (tl.program_id(0) // N).to(tl.int64)
    lanes, dims, columns, tile = tl.arange(0, GP), tl.arange(0, KP), tl.arange(0, VP), tl.arange(0, W)
    here = lanes < G * T
    token, query_head = lanes // G, head * G + lanes % G
    last = tl.load(newest + row * T + T - 1).to(tl.int32)
    # a token that others follow sees none of theirs: its keys begin with its own
    begins = T - 1 - token
    ends = begins + tl.load(seen + row * T + token, mask=here, other=0).to(tl.int32)
    count = tl.max(tl.where(here, ends, 0), 0)
    ring_k = keys + (row * N + head) * S * K
    ring_v = values + (row * N + head) * S * V
    line = (row * T + token) * (N * G) + query_head
    query = tl.load(
        q + line[:, None] * K + dims[None, :], mask=here[:, None] & (dims < K)[None, :], other=0.0
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
        near = (age[None, :] >= begins[:, None]) & (age[None, :] < ends[:, None])
        score = tl.where(near, score * LOG2E, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        # a tile may hold keys of some queries alone
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(weight, 1)
        found = tl.dot(weight.to(near_v.dtype), near_v, input_precision="ieee")
        sums = sums * shrink[:, None] + found
        top = higher
    if PARTS == 1:
        sums = sums / tl.where(here, total, 1.0)[:, None]
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
    """One query's answer from what PARTS programs found, of which some may have seen no key of it."""
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


def padded(size: int) -> int:
    """Of a tile's side that has so many places in use."""
    return max(16, triton.next_power_of_2(size))


def covered(q: Tensor, keys: Tensor, values: Tensor) -> None:
    """Refuse what the kernel does not cover. Raises KernelError."""
    widest = max(keys.shape[3], values.shape[3])
    queries = padded(q.shape[1] * q.shape[2] // keys.shape[1])
    dispatch.require(
        "newest_step",
        width=(widest <= WIDEST, f"heads of {widest} columns, and {WIDEST} is the most"),
        dtype=(q.dtype == keys.dtype == values.dtype, f"{q.dtype}, {keys.dtype} and {values.dtype} differ"),
        queries=(
            queries * padded(values.shape[3]) <= SUMS,
            f"{q.shape[1]} tokens of {q.shape[2] // keys.shape[1]} query heads to a key head, and these times the "
            f"heads' columns may be {SUMS:,}, each made a power of two",
        ),
        layout=(keys.is_contiguous() and values.is_contiguous(), "keys or values are not contiguous"),
    )


@torch.library.custom_op("linearize::newest_step", mutates_args=())
def step(
    q: Tensor, keys: Tensor, values: Tensor, newest: Tensor, seen: Tensor, numbers: list[float]
) -> Tensor:
    """See `recurrent.newest_steps`; numbers: scaling, softcap or 0."""
    scaling, cap = numbers
    batch, tokens, heads, key_dim = q.shape
    held, slots, value_dim = values.shape[1:]
    out = torch.empty(batch, tokens, heads, value_dim, dtype=values.dtype, device=q.device)
    widths = [padded(x) for x in (tokens * heads // held, key_dim, value_dim)]
    tile = min(tile_of(max(widths[1:]), keys.element_size()), max(16, SCORES // widths[0]))
    parts = parts_of(q, batch * held, slots, tile)
    size = (batch, tokens, heads, parts) if parts > 1 else (0,)
    tops, totals = (torch.empty(size, dtype=torch.float32, device=q.device) for _ in range(2))
    found = out if parts == 1 else out.new_empty(*size, value_dim, dtype=torch.float32)
    launch(
        step_kernel, (batch * held, parts), q=q, keys=keys, values=values, newest=newest, seen=seen, out=found,
        tops=tops, totals=totals, scaling=scaling, cap=cap or 1.0, N=held, G=heads // held, T=tokens, S=slots,
        K=key_dim, V=value_dim, GP=widths[0], KP=widths[1], VP=widths[2], W=tile, PARTS=parts, HAS_CAP=cap > 0,
        num_warps=4, num_stages=sharing.STAGES,
    )  # fmt: skip
    if parts > 1:
        launch(
            join_kernel, (batch * tokens * heads,), sums=found, tops=tops, totals=totals, out=out, V=value_dim,
            VP=widths[2], PARTS=parts, PP=triton.next_power_of_2(parts), num_warps=1, num_stages=1,
        )  # fmt: skip
    return out


@step.register_fake
def _(q, keys, values, newest, seen, numbers):
    return torch.empty(*q.shape[:3], values.shape[3], dtype=values.dtype, device=q.device)
