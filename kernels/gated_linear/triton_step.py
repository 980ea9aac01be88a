"""One token of gated linear attention in one launch, in place on the state.

A program owns some value columns of one head of the state and serves the queries that share it; the first of a head's
programs owns the running sum of keys too. So whatever a program writes, nobody else reads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.launch import launch

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def gated_linear_step_kernel(
    q, k, v, log_decay, bonus, live, sums, norms, out, denominator,
    state_heads: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr,
    BV: tl.constexpr, DECAY: tl.constexpr, READ_BEFORE: tl.constexpr, HAS_BONUS: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_LIVE: tl.constexpr,
):  # fmt: skip
    """Names as in `recurrent.gated_linear_step`; DECAY: 0 none, 1 of the head, 2 of key dimensions, 3 of values."""
    line = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    head = line % state_heads
    dims, values = tl.arange(0, KP), tile * BV + tl.arange(0, BV)
    tall, wide = dims < K, values < V
    reach = tl.where(tl.load(live + line) != 0, K, 0) if HAS_LIVE else K
    key = tl.load(k + line * K + dims, mask=tall, other=0.0).to(tl.float32)
    value = tl.load(v + line * V + values, mask=wide, other=0.0).to(tl.float32)
    square = line * K * V + dims[:, None] * V + values[None, :]
    held = (dims < reach)[:, None] & wide[None, :]
    state = tl.load(sums + square, mask=held, other=0.0)
    after = state
    forget = tl.full([KP], 1.0, tl.float32)
    if DECAY == 1:
        forget = tl.exp2(tl.load(log_decay + line).to(tl.float32) * LOG2E) * forget
        after = after * forget[:, None]
    if DECAY == 2:
        forget = tl.exp2(tl.load(log_decay + line * K + dims, mask=tall, other=0.0).to(tl.float32) * LOG2E)
        after = after * forget[:, None]
    if DECAY == 3:
        columns = tl.load(log_decay + line * V + values, mask=wide, other=0.0).to(tl.float32)
        after = after * tl.exp2(columns * LOG2E)[None, :]
    after = after + key[:, None] * value[None, :]
    seen = state if READ_BEFORE else after
    own = tl.zeros([KP], tl.float32)
    if HAS_BONUS:
        own = key * tl.load(bonus + head * K + dims, mask=tall, other=0.0).to(tl.float32)
        seen = seen + own[:, None] * value[None, :]
    norm = tl.zeros([KP], tl.float32)
    norm_after = norm
    if NORMALIZE:
        norm = tl.load(norms + line * K + dims, mask=dims < reach, other=0.0)
        norm_after = norm * forget + key
    seen_norm = (norm if READ_BEFORE else norm_after) + own
    for member in tl.static_range(GROUP):
        query = tl.load(q + (line * GROUP + member) * K + dims, mask=tall, other=0.0).to(tl.float32)
        read = tl.sum(query[:, None] * seen, 0)
        tl.store(out + (line * GROUP + member) * V + values, read.to(out.dtype.element_ty), mask=wide)
        if NORMALIZE:
            total = tl.sum(query * seen_norm, 0)
            if tile == 0:
                tl.store(denominator + line * GROUP + member, total)
    tl.debug_barrier()  # warps that share an element have read it
    tl.store(sums + square, after, mask=held)
    if NORMALIZE:  # noqa: SIM102
        if tile == 0:
            tl.store(norms + line * K + dims, norm_after, mask=dims < reach)


@torch.library.custom_op("linearize::gated_linear_step", mutates_args=("sums", "norms"))
def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, bonus: Tensor | None, sums: Tensor, norms: Tensor | None,
    decay: int, read_before: bool, live: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The launch; see `recurrent.gated_linear_step`, and the kernel for `decay`. The state is contiguous."""
    batch, heads, key_dim = q.shape
    state_heads, value_dim = v.shape[1:]
    out = torch.empty(batch, heads, value_dim, dtype=v.dtype, device=v.device)
    denominator = torch.empty((0,) if norms is None else (batch, heads), dtype=torch.float32, device=v.device)
    # few heads: narrow columns, so that there are more programs
    columns = min(32 if batch * state_heads >= 128 else 16, triton.next_power_of_2(value_dim))
    launch(
        gated_linear_step_kernel, (batch * state_heads, -(-value_dim // columns)),
        q=q.contiguous(), k=k.contiguous(), v=v.contiguous(),
        log_decay=None if log_decay is None else log_decay.contiguous(),
        bonus=None if bonus is None else bonus.contiguous(),
        live=None if live is None else live.to(torch.int8).contiguous(), HAS_LIVE=live is not None, sums=sums,
        norms=norms, out=out, denominator=denominator,
        state_heads=state_heads, GROUP=heads // state_heads, K=key_dim, V=value_dim,
        KP=triton.next_power_of_2(key_dim), BV=columns, DECAY=decay, READ_BEFORE=read_before,
        HAS_BONUS=bonus is not None, NORMALIZE=norms is not None, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out, denominator


@step.register_fake
def _(q, k, v, log_decay, bonus, sums, norms, decay, read_before, live=None):
    out = v.new_empty(*q.shape[:2], v.shape[2])
    return out, v.new_empty((0,) if norms is None else q.shape[:2], dtype=torch.float32)


def covered(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, sums: Tensor, norms: Tensor | None
) -> None:
    """Refuse what the kernel does not cover.

    Raises:
        KernelError: with every rule that is broken.
    """
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    given = [x.dtype for x in (q, k, v, log_decay) if x is not None]
    state = [sums] if norms is None else [sums, norms]
    dispatch.require(
        "gated_linear_step",
        dtype=(all(x in kinds for x in given), f"{given} must be bfloat16, float16 or float32"),
        features=(k.shape[-1] <= 256, f"{k.shape[-1]} must be at most 256"),
        heads=(
            q.shape[1] % k.shape[1] == 0,
            f"{q.shape[1]} must be a multiple of {k.shape[1]} heads of the state",
        ),
        state=(
            all(x.dtype == torch.float32 and x.is_contiguous() for x in state),
            "sums and norms must be float32 and contiguous, to be written in place",
        ),
    )
