"""A program owns a key head of a row and all query heads that share it: a key is read once, and none that is not seen.

Reading keys is what costs: 2 x K x 2 bytes a key head and token, so the loop ends where the row's document begins.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.launch import launch

LOG2E = tl.constexpr(1.4426950408889634)
WIDEST = 256
"""Columns of a head."""


@triton.jit
def step_kernel(
    q, keys, values, newest, seen, out, scaling, cap,
    N: tl.constexpr, G: tl.constexpr, S: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    GP: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, W: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """The answers of one key head's queries, oldest tiles last."""
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
    for start in range(0, count, W):
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
        higher = tl.maximum(
            top, tl.max(score, 1)
        )  # the newest key is always seen: finite from the first tile
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weight, 1)
        near = tl.dot(weight.to(near_v.dtype), near_v, input_precision="ieee")
        sums = sums * shrink[:, None] + near
        top = higher
    answer = sums / total[:, None]
    tl.store(
        out + line[:, None] * V + columns[None, :],
        answer.to(out.dtype.element_ty),
        mask=(lanes < G)[:, None] & (columns < V)[None, :],
    )


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
    # 64 keys of 64 columns in flight twice over; wider heads take fewer at a time
    tile = 64 if max(widths[1:]) <= 128 else 32
    launch(
        step_kernel, (batch * held,), q=q, keys=keys, values=values, newest=newest, seen=seen, out=out,
        scaling=scaling, cap=cap or 1.0, N=held, G=heads // held, S=slots, K=key_dim, V=value_dim, GP=widths[0],
        KP=widths[1], VP=widths[2], W=tile, HAS_CAP=cap > 0, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


@step.register_fake
def _(q, keys, values, newest, seen, numbers):
    return torch.empty(*q.shape[:2], values.shape[3], dtype=values.dtype, device=q.device)
