"""One token in one launch, in place on the state; features are made in registers.

A program owns some value columns of one head of the state and serves the queries that share it; the first of a head's
programs owns the running sum of features too. So whatever a program writes, nobody else reads.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.launch import launch
from linearize.kernels.taylor_linear.plan import DIMS, features
from linearize.kernels.taylor_linear.triton_common import feature_table


@triton.jit
def load_features(x, first, second, has_first, has_second, factor):
    """phi of one token [F], float32."""
    a = tl.load(x + first, mask=has_first, other=1.0).to(tl.float32)
    b = tl.load(x + second, mask=has_second, other=1.0).to(tl.float32)
    return a * b * factor


@triton.jit
def taylor_linear_step_kernel(
    q, k, v, valid, sums, norms, out, denominator, root, q_row, q_head, k_row, k_head,
    state_heads: tl.constexpr, value_heads: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    FP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, HAS_VALID: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Names as in `recurrent.taylor_linear_step`; q_row and so on are strides."""
    line = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    batch, head = line // state_heads, line % state_heads
    places, values = tl.arange(0, FP), tile * BV + tl.arange(0, BV)
    tall, wide = places < F, values < V
    first, second, has_first, has_second, factor = feature_table(0, root, D, FP)
    key = load_features(k + batch * k_row + head * k_head, first, second, has_first, has_second, factor)
    if HAS_VALID:
        key = tl.where(tl.load(valid + batch) != 0, key, 0.0)
    value_line = batch * value_heads + head // (state_heads // value_heads)
    value = tl.load(v + value_line * V + values, mask=wide, other=0.0).to(tl.float32)
    square = line * F * V + places[:, None] * V + values[None, :]
    held = tall[:, None] & wide[None, :]
    state = tl.load(sums + square, mask=held, other=0.0) + key[:, None] * value[None, :]
    norm = tl.zeros([FP], tl.float32)
    if NORMALIZE:
        norm = tl.load(norms + line * F + places, mask=tall, other=0.0) + key
    for member in tl.static_range(GROUP):
        at = line * GROUP + member
        query = load_features(
            q + batch * q_row + (head * GROUP + member) * q_head, first, second, has_first, has_second, factor
        )
        read = tl.sum(query[:, None] * state, 0)
        tl.store(out + at * V + values, read.to(out.dtype.element_ty), mask=wide)
        if NORMALIZE:
            total = tl.sum(query * norm, 0)
            if tile == 0:
                tl.store(denominator + at, total)
    tl.debug_barrier()  # warps that share an element have read it
    tl.store(sums + square, state, mask=held)
    if NORMALIZE:  # noqa: SIM102
        if tile == 0:
            tl.store(norms + line * F + places, norm, mask=tall)


@torch.library.custom_op("linearize::taylor_linear_step", mutates_args=("sums", "norms"))
def step(
    q: Tensor, k: Tensor, v: Tensor, scale: float, sums: Tensor, norms: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The launch; see `recurrent.taylor_linear_step`. The state is contiguous."""
    batch, heads, dim = q.shape
    state_heads, value_heads, value_dim = k.shape[1], *v.shape[1:]
    out = torch.empty(batch, heads, value_dim, dtype=v.dtype, device=v.device)
    denominator = torch.empty((0,) if norms is None else (batch, heads), dtype=torch.float32, device=v.device)
    padded = triton.next_power_of_2(features(dim))
    # few heads: narrow columns, so that there are more programs
    columns = 16 if padded > 256 else 32 if batch * state_heads >= 128 else 16
    columns = min(columns, triton.next_power_of_2(value_dim))
    # a map's product leaves heads in front of rows; copying that would be two launches more
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    launch(
        taylor_linear_step_kernel, (batch * state_heads, -(-value_dim // columns)),
        q=q, k=k, v=v.contiguous(), q_row=q.stride(0), q_head=q.stride(1), k_row=k.stride(0), k_head=k.stride(1),
        valid=None if valid is None else valid.contiguous(), sums=sums, norms=norms, out=out, denominator=denominator,
        root=math.sqrt(scale), state_heads=state_heads, value_heads=value_heads, GROUP=heads // state_heads, D=dim,
        F=features(dim), FP=padded, V=value_dim, BV=columns, HAS_VALID=valid is not None, NORMALIZE=norms is not None,
        num_warps=8 if padded > 256 else 4, num_stages=1,
    )  # fmt: skip
    return out, denominator


@step.register_fake
def _(q, k, v, scale, sums, norms, valid):
    out = v.new_empty(*q.shape[:2], v.shape[2])
    return out, v.new_empty((0,) if norms is None else q.shape[:2], dtype=torch.float32)


def covered(q: Tensor, k: Tensor, v: Tensor, sums: Tensor, norms: Tensor | None) -> None:
    """Refuse what the kernel does not cover.

    Raises:
        KernelError: with every rule that is broken.
    """
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    state = [sums] if norms is None else [sums, norms]
    given = [x.dtype for x in (q, k, v)]
    heads = (q.shape[1], k.shape[1], v.shape[1])
    dispatch.require(
        "taylor_linear_step",
        dtype=(all(x in kinds for x in given), f"{given} must be bfloat16, float16 or float32"),
        dim=(k.shape[-1] in DIMS, f"{k.shape[-1]} must be one of {DIMS}"),
        heads=(
            heads[0] % heads[1] == 0 and heads[1] % heads[2] == 0,
            f"{heads} of queries, of the state and of values must divide one another",
        ),
        state=(
            all(x.dtype == torch.float32 and x.is_contiguous() for x in state),
            "sums and norms must be float32 and contiguous, to be written in place",
        ),
    )
