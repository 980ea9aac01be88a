"""One token of gated slots in one launch, in place on both memories: a program for each head of the state."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.launch import launch
from linearize.kernels.slots.triton_writes import complement

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
NUMBERS = 4096
"""Of a memory that a program holds at a time."""


@triton.jit
def slots_step_kernel(
    q, k, v, writes, log_decay, keys, values, out,
    GROUP: tl.constexpr, GP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, OWN_WRITES: tl.constexpr,
):  # fmt: skip
    """Names as in `recurrent.slots_step`; GP, SP: GROUP and S filled up to powers of two."""
    line = tl.program_id(0).to(tl.int64)
    slots, members = tl.arange(0, SP), tl.arange(0, GP)
    held = slots < S
    decay = tl.load(log_decay + line * S + slots, mask=held, other=0.0).to(tl.float32)
    taken = complement(decay)
    if OWN_WRITES:
        taken = tl.load(writes + line * S + slots, mask=held, other=0.0).to(tl.float32)
    kept = tl.exp2(decay * LOG2E)
    scores = tl.zeros([GP, SP], tl.float32)
    for part in range((K + BK - 1) // BK):
        dims = part * BK + tl.arange(0, BK)
        inside = dims < K
        square = line * K * S + dims[:, None] * S + slots[None, :]
        mask = inside[:, None] & held[None, :]
        key = tl.load(k + line * K + dims, mask=inside, other=0.0).to(tl.float32)
        memory = tl.load(keys + square, mask=mask, other=0.0) * kept[None, :] + key[:, None] * taken[None, :]
        tl.debug_barrier()  # warps that share an element have read it
        tl.store(keys + square, memory, mask=mask)
        for member in tl.static_range(GROUP):
            query = tl.load(q + (line * GROUP + member) * K + dims, mask=inside, other=0.0).to(tl.float32)
            found = tl.sum(query[:, None] * memory, 0)
            scores += tl.where((members == member)[:, None], found[None, :], 0.0)
    scores = tl.where(held[None, :], scores, float("-inf"))
    weights = tl.exp2((scores - tl.max(scores, 1)[:, None]) * LOG2E)
    weights /= tl.sum(weights, 1)[:, None]
    for part in range((V + BV - 1) // BV):
        columns = part * BV + tl.arange(0, BV)
        inside = columns < V
        square = line * S * V + slots[:, None] * V + columns[None, :]
        mask = held[:, None] & inside[None, :]
        value = tl.load(v + line * V + columns, mask=inside, other=0.0).to(tl.float32)
        memory = (
            tl.load(values + square, mask=mask, other=0.0) * kept[:, None] + taken[:, None] * value[None, :]
        )
        tl.debug_barrier()
        tl.store(values + square, memory, mask=mask)
        for member in tl.static_range(GROUP):
            weight = tl.sum(tl.where((members == member)[:, None], weights, 0.0), 0)
            read = tl.sum(weight[:, None] * memory, 0)
            tl.store(out + (line * GROUP + member) * V + columns, read.to(out.dtype.element_ty), mask=inside)


@torch.library.custom_op("linearize::slots_step", mutates_args=("keys", "values"))
def step(
    q: Tensor, k: Tensor, v: Tensor, writes: Tensor | None, log_decay: Tensor, keys: Tensor, values: Tensor
) -> Tensor:  # fmt: skip
    """The launch; see `recurrent.slots_step`. The memories are contiguous."""
    batch, heads, key_dim = q.shape
    state_heads, value_dim = v.shape[1:]
    slots = log_decay.shape[2]
    group, padded = heads // state_heads, triton.next_power_of_2(slots)
    rows = max(1, NUMBERS // padded)
    out = torch.empty(batch, heads, value_dim, dtype=v.dtype, device=v.device)
    launch(
        slots_step_kernel, (batch * state_heads,),
        q=q.contiguous(), k=k.contiguous(), v=v.contiguous(), writes=None if writes is None else writes.contiguous(),
        log_decay=log_decay.contiguous(), keys=keys, values=values, out=out,
        GROUP=group, GP=triton.next_power_of_2(group), K=key_dim, V=value_dim, S=slots, SP=padded,
        BK=min(rows, triton.next_power_of_2(key_dim)), BV=min(rows, triton.next_power_of_2(value_dim)),
        OWN_WRITES=writes is not None, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


@step.register_fake
def _(q, k, v, writes, log_decay, keys, values):
    return v.new_empty(*q.shape[:2], v.shape[2])


def covered(
    q: Tensor, k: Tensor, v: Tensor, writes: Tensor | None, log_decay: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Refuse what the kernel does not cover.

    Raises:
        KernelError: with every rule that is broken.
    """
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    given = [x.dtype for x in (q, k, v, writes, log_decay) if x is not None]
    dispatch.require(
        "slots_step",
        dtype=(all(x in kinds for x in given), f"{given} must be bfloat16, float16 or float32"),
        slots=(log_decay.shape[-1] <= 256, f"{log_decay.shape[-1]} must be at most 256"),
        heads=(
            q.shape[1] % k.shape[1] == 0,
            f"{q.shape[1]} must be a multiple of {k.shape[1]} heads of the state",
        ),
        state=(
            all(x.dtype == torch.float32 and x.is_contiguous() for x in (keys, values)),
            "keys and values must be float32 and contiguous, to be written in place",
        ),
    )
