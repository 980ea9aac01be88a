"""One token of the delta rule in one launch: the state forgets, the value under the key is moved, the queries read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.launch import launch


@triton.jit
def step_kernel(
    q, k, v, beta, log_decay, live, state, out,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    K_TILE: tl.constexpr, V_TILE: tl.constexpr, DECAY: tl.constexpr, HAS_LIVE: tl.constexpr,
):  # fmt: skip
    """Columns of one head of the state, and of the outputs of the queries that read it.

    DECAY: 0 none, 1 of the head, 2 of every key dimension. HAS_LIVE: heads that are not live are neither read nor
    written.
    """
    parts: tl.constexpr = (V + V_TILE - 1) // V_TILE
    group: tl.constexpr = heads // state_heads
    part = tl.program_id(0) % parts
    row_head = (tl.program_id(0) // parts).to(tl.int64)
    dims, values = tl.arange(0, K_TILE), part * V_TILE + tl.arange(0, V_TILE)
    place = state + row_head * K * V + dims[:, None] * V + values[None, :]
    reach = tl.where(tl.load(live + row_head) != 0, V, 0) if HAS_LIVE else V
    wide = values < reach
    inside = (dims < K)[:, None] & wide[None, :]
    key = tl.load(k + row_head * K + dims, mask=dims < K, other=0.0).to(tl.float32)
    value = tl.load(v + row_head * V + values, mask=wide, other=0.0).to(tl.float32)
    sums = tl.load(place, mask=inside, other=0.0)
    if DECAY == 1:
        sums *= tl.exp(tl.load(log_decay + row_head).to(tl.float32))
    if DECAY == 2:
        forgets = tl.load(log_decay + row_head * K + dims, mask=dims < K, other=0.0).to(tl.float32)
        sums *= tl.exp(forgets)[:, None]
    held = tl.sum(sums * key[:, None], 0)
    change = tl.load(beta + row_head).to(tl.float32) * (value - held)
    sums += key[:, None] * change[None, :]
    tl.store(place, sums, mask=inside)
    for member in range(group):
        reader = row_head * group + member
        query = tl.load(q + reader * K + dims, mask=dims < K, other=0.0).to(tl.float32)
        result = tl.sum(sums * query[:, None], 0)
        tl.store(out + reader * V + values, result.to(out.dtype.element_ty), mask=values < V)


@torch.library.custom_op("linearize::gated_delta_step", mutates_args=("state",))
def step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, live: Tensor | None
) -> Tensor:  # fmt: skip
    """See `recurrent.delta_step`; every tensor contiguous."""
    batch, heads, key_dim = q.shape
    state_heads, value_dim = v.shape[1:]
    out = torch.empty(batch, heads, value_dim, dtype=v.dtype, device=v.device)
    key_tile = max(16, 1 << (key_dim - 1).bit_length())
    value_tile = 16 if key_tile >= 128 else 32
    parts = -(-value_dim // value_tile)
    launch(
        step_kernel, (batch * state_heads * parts,), q=q, k=k, v=v, beta=beta, log_decay=log_decay,
        live=None if live is None else live.to(torch.int8).contiguous(), HAS_LIVE=live is not None, state=state,
        out=out, heads=heads, state_heads=state_heads, K=key_dim, V=value_dim, K_TILE=key_tile,
        V_TILE=value_tile, DECAY=0 if log_decay is None else log_decay.dim() - 1,
        num_warps=4 if key_tile > 128 else 2, num_stages=1,
    )  # fmt: skip
    return out


@step.register_fake
def _(q, k, v, beta, log_decay, state, live) -> Tensor:
    return torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=v.dtype, device=v.device)


def covered(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> None:
    """Refuse what the kernel does not cover.

    Raises:
        KernelError: with every rule that is broken.
    """
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    dispatch.require(
        "gated_delta_step",
        dtype=(
            all(x.dtype in kinds for x in (q, k, v)),
            f"{q.dtype}, {k.dtype}, {v.dtype}: each one of {kinds}",
        ),
        key_dim=(k.shape[-1] <= 256, f"{k.shape[-1]} must be at most 256"),
        heads=(
            q.shape[1] % k.shape[1] == 0,
            f"{q.shape[1]} must be a multiple of {k.shape[1]} heads of the state",
        ),
        state=(
            state.dtype == torch.float32 and state.is_contiguous(),
            f"{state.dtype} with strides {state.stride()}: it is written in place, contiguous and in float32",
        ),
    )
