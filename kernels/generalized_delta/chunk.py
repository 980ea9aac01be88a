"""The same in chunks: what a chunk's tokens find in the state by one triangular solve; O(T) memory."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.chunks import Decay, at_least_float32, cut_documents, decayed_products, scan


def generalized_delta_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    docs: Tensor,
    state: Tensor,
    *,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Arguments and results of `generalized_delta_reference`; `chunk` is a power of two.

    Token t finds u_t = S_{t-1}^T a_t, where S_{t-1} is the entering state S and the b_s u_s^T + k_s v_s^T before t,
    all decayed. So the u of a chunk solve (I - [a, b]) U = [a, k] V + A~ S, with [a, b] the products of every a with
    every earlier b under the decay between them, and A~ the decayed a. The solve is done for all chunks at once,
    with [a, k] V and A~ side by side. In Triton (chunks of 64 whatever `chunk` says) what is decided is:

    - What a chunk does is worked out before any state is known, for all chunks side by side: to the state (kept S + P S
      + N, one product in the loop over chunks, with P^T in the mirrored loop of backward) and to its outputs (M V + Y
      S).
      The letters are those of `triton_forward` and `triton_backward`.
    - Decays are exact however strong they are. While neither half of a chunk forgets more than exp(-41) in a key
      dimension, all pairs are one product with exponents from the chunk's middle; RWKV-7's own decays, at least
      exp(-0.61) a token, never do. Other chunks are halved (`gated_linear.triton_levels`), which is decided on the
      device, in launches of their own that leave the rest alone.
    - (I - [a, b])^-1 is computed in float32, by blocks of 16, 32 and 64, and kept in the dtype of q like all that is
      stored for a chunk; states between chunks and what a chunk keeps of them are float32.
    - Nothing is stored for backward where no gradient is asked for. U and its gradient are computed again.
    - The carried state has a gradient, and so has the new one.
    - q, k, v, a and b are bfloat16, float16 or float32 alike and the log decays any of these, F and V at most 256
      (float32: 128; wider float32 runs in torch unless Triton is asked for), any H that is a multiple of M. Nothing is
      repeated for grouped heads, no document boundary is read back to the host.

    Returns:
        o [B, T, H, V], in the dtype of q in Triton and for narrow inputs, and the new state, at least float32.

    Raises:
        KernelError: Triton is to run what it does not cover.
    """
    too_wide = q.dtype == torch.float32 and max(k.shape[-1], v.shape[-1]) > 128
    if dispatch.use_triton(q, k, v, state) and not (too_wide and dispatch.automatic()):
        from linearize.kernels.generalized_delta.operator import generalized_delta_triton

        return generalized_delta_triton(q, k, v, a, b, log_decay, docs, state)
    dtype = q.dtype
    q, k, v, a, b, log_decay = at_least_float32(q, k, v, a, b, log_decay)
    out, state = _torch(q, k, v, a, b, log_decay, docs, state, chunk)
    return out.to(dtype), state


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    docs: Tensor,
    state: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    blocks = cut_documents(docs, chunk)
    q_cut = blocks.cut_grouped(q, k.shape[2])
    k_cut, v_cut, a_cut, b_cut, log_cut = (blocks.cut(x) for x in (k, v, a, b, log_decay))
    before, after = Decay(log_cut, read_before=True), Decay(log_cut)
    group = q_cut.shape[-2]
    visible = blocks.visible[:, :, None].to(q.dtype)
    rows_visible = visible.repeat_interleave(group, -2)
    entering = blocks.entering[:, :, None, :, None].to(q.dtype)
    open_end = after.to_end * blocks.open[:, :, None, :, None].to(q.dtype)
    kept = after.whole[..., None] * blocks.kept[:, :, None, None, None].to(q.dtype)

    a_grouped = a_cut[..., None, :]
    sides = [
        decayed_products(a_grouped, k_cut, before) * visible @ v_cut,
        a_cut * before.from_start * entering,
    ]
    lower = -(decayed_products(a_grouped, b_cut, before) * visible)
    solved = torch.linalg.solve_triangular(lower, torch.cat(sides, -1), upper=False, unitriangular=True)
    fresh, reader = solved.split([v.shape[-1], k.shape[-1]], -1)
    added = (k_cut * open_end).mT @ v_cut
    entered, state = scan(_change, state, kept, added, (b_cut * open_end).mT, fresh, reader)

    found = fresh + reader @ entered
    out = decayed_products(q_cut, k_cut, after) * rows_visible @ v_cut
    out = out + decayed_products(q_cut, b_cut, after) * rows_visible @ found
    out = out + (q_cut * (after.from_start * entering)[..., None, :]).flatten(-3, -2) @ entered
    return blocks.join(out.unflatten(-2, (-1, group))), state


def _change(
    state: Tensor, kept: Tensor, added: Tensor, writers: Tensor, fresh: Tensor, reader: Tensor
) -> Tensor:
    return kept * state + added + writers @ (fresh + reader @ state)
