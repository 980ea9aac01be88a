"""The same in chunks: decays by halving inside a chunk, a state between chunks; O(T) memory, safe in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.chunks import (
    Decay,
    at_least_float32,
    cut_documents,
    decayed_products,
    decayed_values,
    scan,
)
from linearize.kernels.gated_linear.reference import Gated, GatedState, check_options
from linearize.kernels.linear.chunk import torch_chunk


def gated_linear_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    docs: Tensor | None,
    state: GatedState | None,
    *,
    bonus: Tensor | None = None,
    read_before: bool = False,
    normalize: bool = True,
    decay_values: bool = False,
    chunk: int = 64,
) -> Gated:
    """Arguments and results of `gated_linear_reference`, and None for no decay, one document, or an empty state.

    On CUDA it runs in Triton (`operator.py`): q, k and v of one dtype, bfloat16, float16 or float32, the log decays
    float32 or narrower; numerators come in the dtype of v, denominators and states in float32. Every decay is exact,
    strong ones too: exponents are sums of the decays between two tokens of a tile, or their negatives where these stay
    in range. Decays of values (`decay_values`) with a bonus keep the form below, in linear memory, on every device.

    Args:
        chunk: tokens in a chunk of the torch form, a power of two.

    Raises:
        KernelError: Triton is to run what it does not cover.
    """
    check_options(normalize=normalize, decay_values=decay_values)
    if decay_values and dispatch.use_triton(q, k, v) and (bonus is None or not dispatch.automatic()):
        from linearize.kernels.gated_linear.operator_values import gated_values_triton

        dispatch.require(
            "gated_linear",
            bonus=(bonus is None, "values that decay take none"),
            log_decay=(log_decay is not None, "values that decay need theirs"),
        )
        assert log_decay is not None
        sums = None if state is None else state[0]
        return gated_values_triton(q, k, v, log_decay, docs, sums, read_before=read_before)
    if not decay_values and dispatch.use_triton(q, k, v):
        from linearize.kernels.gated_linear.operator import gated_linear_triton

        return gated_linear_triton(
            q, k, v, log_decay, docs, state, bonus=bonus, read_before=read_before, normalize=normalize
        )
    dtype = v.dtype
    q, k, v, log_decay, bonus = at_least_float32(q, k, v, log_decay, bonus)
    if docs is None:
        docs = torch.zeros(q.shape[:2], dtype=torch.int64, device=q.device)
    if state is None:
        wide = torch.promote_types(k.dtype, torch.float32)
        state = (k.new_zeros(len(k), *k.shape[2:], v.shape[-1], dtype=wide), None)
    if log_decay is None and bonus is None and not read_before:
        norms = torch.zeros_like(state[0][..., 0]) if state[1] is None else state[1]
        numerator, denominator, (sums, norms) = torch_chunk(q, k, v, docs, (state[0], norms), chunk)
        numerator = numerator.to(dtype)
        return (numerator, denominator, (sums, norms)) if normalize else (numerator, None, (sums, None))
    if log_decay is None:
        log_decay = k.new_zeros(k.shape[:3])
    numerator, norm, state = _torch(
        q, k, v, log_decay, docs, state, bonus, read_before, normalize, decay_values, chunk
    )
    return numerator.to(dtype), norm, state


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    docs: Tensor,
    state: GatedState,
    bonus: Tensor | None,
    read_before: bool,
    normalize: bool,
    decay_values: bool,
    chunk: int,
) -> Gated:
    """In blocks of torch. The normalizer is one more column of the state, whose values are ones, sharing the decay."""
    blocks = cut_documents(docs, chunk)
    sums, norms = state
    if normalize:
        v = F.pad(v, (0, 1), value=1.0)
        sums = torch.cat([sums, (torch.zeros_like(sums[..., 0]) if norms is None else norms)[..., None]], -1)
    q_cut, k_cut, v_cut = blocks.cut_grouped(q, k.shape[2]), blocks.cut(k), blocks.cut(v)
    group = q_cut.shape[-2]
    log_decay = log_decay[..., None] if log_decay.dim() == 3 else log_decay
    decay = Decay(blocks.cut(log_decay), read_before or bonus is not None)
    visible = blocks.visible[:, :, None].repeat_interleave(group, -2).to(q.dtype)
    kept = blocks.kept[:, :, None, None].to(q.dtype) * decay.whole
    entering = blocks.entering[:, :, None, :, None].to(q.dtype)
    open_keys = k_cut * blocks.open[:, :, None, :, None].to(q.dtype)

    if decay_values:
        inside = decayed_values((q_cut.flatten(-3, -2) @ k_cut.mT) * visible, v_cut, decay)
        added = open_keys.mT @ (v_cut * decay.to_end)
        before, sums = scan(_forget_and_add, sums, kept[..., None, :], added)
        earlier = (q_cut.flatten(-3, -2) @ before).unflatten(-2, (-1, group))
        earlier = earlier * (decay.from_start * entering)[..., None, :]
    else:
        inside = ((decayed_products(q_cut, k_cut, decay) * visible) @ v_cut).unflatten(-2, (-1, group))
        added = (open_keys * decay.to_end).mT @ v_cut
        before, sums = scan(_forget_and_add, sums, kept[..., None], added)
        reader = q_cut * (decay.from_start * entering)[..., None, :]
        earlier = (reader.flatten(-3, -2) @ before).unflatten(-2, (-1, group))
    out = inside + earlier
    if bonus is not None:
        own = (q_cut * (k_cut * bonus[:, None])[..., None, :]).sum(-1, keepdim=True)
        out = out + own * v_cut[..., None, :]
    out = blocks.join(out)
    if normalize:
        return out[..., :-1], out[..., -1], (sums[..., :-1], sums[..., -1])
    return out, None, (sums, None)


def _forget_and_add(state: Tensor, kept: Tensor, added: Tensor) -> Tensor:
    return torch.addcmul(added, kept, state)
