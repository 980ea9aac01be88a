"""The same in chunks: the changes of a chunk's tokens by one triangular solve (the UT transform); O(T) memory."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.kernels.chunks import Decay, cut_documents, scan


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
) -> tuple[Tensor, Tensor]:
    """Arguments and results of `delta_reference`; `chunk` is a power of two.

    Token t changes the state by k_t u_t^T, where u_t = beta_t (v_t - what the decayed state holds under k_t), and that
    state is the entering one and the changes before t. So the u of a chunk solve (I + L) U = beta (V - K~ S), with L
    the strictly lower part of beta K K^T times decays and K~ the decayed keys (Yang et al. 2024; decays as in Gated
    DeltaNet). The solve is done for all chunks at once, with V and K~ side by side.
    """
    blocks = cut_documents(docs, chunk)
    q_cut, k_cut, v_cut = blocks.cut_grouped(q, k.shape[2]), blocks.cut(k), blocks.cut(v)
    strength = blocks.cut(beta[..., None])
    log_decay = torch.zeros_like(beta) if log_decay is None else log_decay
    decay = Decay(blocks.cut(log_decay[..., None]))
    decays = decay.between * blocks.visible[:, :, None].to(q.dtype)
    reach = decay.from_start * blocks.entering[:, :, None, :, None].to(q.dtype)
    kept = decay.whole[..., None] * blocks.kept[:, :, None, None, None].to(q.dtype)
    writers = (k_cut * decay.to_end * blocks.open[:, :, None, :, None].to(q.dtype)).mT

    lower = strength * (k_cut @ k_cut.mT) * decays
    sides = strength * torch.cat([v_cut, k_cut * reach], -1)
    solved = torch.linalg.solve_triangular(lower, sides, upper=False, unitriangular=True)
    fresh, held = solved.split([v.shape[-1], k.shape[-1]], -1)
    before, state = scan(_change, state, kept, writers, fresh, held)

    group = q_cut.shape[-2]
    changes = fresh - held @ before
    weights = (q_cut.flatten(-3, -2) @ k_cut.mT) * decays.repeat_interleave(group, -2)
    earlier = (q_cut * reach[..., None, :]).flatten(-3, -2) @ before
    return blocks.join((weights @ changes + earlier).unflatten(-2, (-1, group))), state


def _change(state: Tensor, kept: Tensor, writers: Tensor, fresh: Tensor, held: Tensor) -> Tensor:
    return kept * state + writers @ (fresh - held @ state)
