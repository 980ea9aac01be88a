"""The same in chunks: the changes of a chunk's tokens by one triangular solve (the UT transform); O(T) memory."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.chunks import Decay, at_least_float32, cut_documents, decayed_products, scan


def delta_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    docs: Tensor,
    state: Tensor,
    *,
    chunk: int = 64,
    keeps: bool = True,
) -> tuple[Tensor, Tensor]:
    """Arguments and results of `delta_reference`; `chunk` is a power of two.

    Token t changes the state by k_t u_t^T, where u_t = beta_t (v_t - what the decayed state holds under k_t), and that
    state is the entering one and the changes before t. So the u of a chunk solve (I + A) U = beta (V - K~ S), with A
    the strictly lower part of beta K K^T times decays and K~ the decayed keys (Yang et al. 2024; decays as in Gated
    DeltaNet). In torch the solve is done for all chunks at once, with V and K~ side by side. In Triton (chunks of 64
    whatever `chunk` says) what is decided is:

    - T = (I + A)^-1 is computed once, in float32 by blocks of 16, and kept in the dtype of q for both directions. Its
      products are tf32 for 16-bit inputs: with beta in [0, 1] that costs less than rounding T; with beta near 2 and
      keys that are nearly one key the error of T grows to 1e-2, as it does from rounding the keys.
    - Every product of float32 inputs is three tf32 products, exact to 1e-6.
    - The loop over chunks has one product in it: a chunk takes S to kept S - P S + N, with P = K_e^T T (beta K~) and
      N = K_e^T T (beta V) made for all chunks side by side (K_e: keys with the decay to the chunk's end). The gradients
      of the states obey the same with P^T, so backward runs the same kernel from right to left. P has at most twice the
      length of what it takes away, so rounding it costs no more than rounding K and W = T (beta K~) would.
    - T, P and the entering states are saved; changes and attention within chunks are computed again. Where decays are
      a head's, or there are none, and nothing `keeps` them, they are computed again too, by three launches: a text
      is then read once more, and 3 x 128 bytes a token and head of 64 are free (K = V = 64, 16 bits).
    - The carried state has a gradient, since that is where the backward loop ends; so does the new state.
    - Decays of a head within a chunk are differences of sums in float32, at most zero before they are exponentiated:
      log decays of -20 a token cost 1e-4 of a decay, and nothing overflows.
    - Decays of key dimensions (`triton_key_*.py`) scale both tiles of a product of pairs, from the middle of a chunk,
      which is halved first where that would overflow (gated_linear's `triton_levels`): sums of their own terms, exact.
      A and the weights M of the queries are made once, together, and M is saved too.
    - q, k and v are bfloat16, float16 or float32 alike, F and V at most 256 (float32: 128), any H that is a multiple of
      M. Nothing is repeated for grouped heads, and no document boundary is read back to the host.

    Returns:
        o [B, T, H, V], in Triton in the dtype of q, and the new state, in Triton in float32.

    Raises:
        KernelError: Triton is to run what it does not cover.
    """
    if dispatch.use_triton(q, k, v, state):
        from linearize.kernels.gated_delta.operator import delta_triton

        return delta_triton(q, k, v, beta, log_decay, docs, state, keeps=keeps)
    dtype = q.dtype
    q, k, v, beta, log_decay = at_least_float32(q, k, v, beta, log_decay)
    out, state = _torch(q, k, v, beta, log_decay, docs, state, chunk)
    return out.to(dtype), state


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    docs: Tensor,
    state: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    blocks = cut_documents(docs, chunk)
    q_cut, k_cut, v_cut = blocks.cut_grouped(q, k.shape[2]), blocks.cut(k), blocks.cut(v)
    strength = blocks.cut(beta[..., None])
    log_decay = torch.zeros_like(beta) if log_decay is None else log_decay
    decay = Decay(blocks.cut(log_decay if log_decay.dim() == 4 else log_decay[..., None]))
    visible = blocks.visible[:, :, None].to(q.dtype)
    reach = decay.from_start * blocks.entering[:, :, None, :, None].to(q.dtype)
    kept = decay.whole[..., None] * blocks.kept[:, :, None, None, None].to(q.dtype)
    writers = (k_cut * decay.to_end * blocks.open[:, :, None, :, None].to(q.dtype)).mT

    lower = strength * decayed_products(k_cut[..., None, :], k_cut, decay) * visible
    sides = strength * torch.cat([v_cut, k_cut * reach], -1)
    solved = torch.linalg.solve_triangular(lower, sides, upper=False, unitriangular=True)
    fresh, held = solved.split([v.shape[-1], k.shape[-1]], -1)
    before, state = scan(_change, state, kept, writers, fresh, held)

    group = q_cut.shape[-2]
    changes = fresh - held @ before
    weights = decayed_products(q_cut, k_cut, decay) * visible.repeat_interleave(group, -2)
    earlier = (q_cut * reach[..., None, :]).flatten(-3, -2) @ before
    return blocks.join((weights @ changes + earlier).unflatten(-2, (-1, group))), state


def _change(state: Tensor, kept: Tensor, writers: Tensor, fresh: Tensor, held: Tensor) -> Tensor:
    return kept * state + writers @ (fresh - held @ state)
