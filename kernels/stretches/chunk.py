"""The same in chunks: what a chunk does is made once for all stretches, and each stretch has a state; O(T) memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.chunks import Blocks, Decay, at_least_float32, cut_documents, decayed_products, scan
from linearize.kernels.stretches.reference import level_of


def widest(dtype: torch.dtype) -> int:
    """Columns of keys or of values of a head that Triton takes: a kernel holds several tiles of as many."""
    return 64 if dtype == torch.float32 else 128


@dataclass(frozen=True)
class Stretches:
    """Which stretches have states, of L + 2 levels.

    Attributes:
        block: tokens in a block, a power of two.
        levels: states of levels 0 ... `levels` - 1; no text at hand reaches further unless `older`.
        older: whether one more state holds the whole past, of which what is on no level gets the last share; then
            `levels` is L + 1.
    """

    block: int
    levels: int
    older: bool

    @property
    def count(self) -> int:
        """States."""
        return self.levels + self.older


def stretches_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    shares: Tensor,
    place: Tensor,
    docs: Tensor,
    stretches: Stretches,
    before: Tensor | None = None,
    state: Tensor | None = None,
    *,
    chunk: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """`stretches_reference` in O(T) memory, from a state to a state.

    Every stretch is read through the same transitions, so what a chunk does is made once, whatever the number of
    stretches: W, what its queries read of its own values (each weight is multiplied with the share of its pair's
    level), Y, what they read of the entering state, P, what it takes out of that, and N, what it writes. With b the
    block of the first token of a chunk, all that lies before it is split by the bits of b: level l >= 1 holds something
    where bit l - 1 is set. Each of these stretches lies, for every query of the chunk, on one level as a whole, also
    where the query's block differs from b in more bits; so chunks need not begin where stretches do, and documents
    may be cut anywhere. The state of level l is S <- kept S - P S + N, emptied where its pair of stretches ends, to
    which only tokens of the first of a pair write; so it is ready when the second begins, and nothing is subtracted.

    In Triton, with one decay a head or none: one launch each for T (of `gated_delta`), the matrices, writing, the loop
    over chunks, outputs; backward makes all but outputs again from the inputs, which are all that is kept, and has nine
    more.

    Args:
        q, k, v, beta, log_decay, shares, place, docs: as `stretches_reference` has them; shares float32 or wider.
        stretches: what has states.
        before: [B] tokens that document 0 has had before, or None for none.
        state: [B, N, M, K, V], N = `stretches.count`, or None where all are empty: on level 0 what the last token's
            block holds; on level l what the pair of stretches has written in which that token lies; last, of `older`,
            everything.
        chunk: tokens in a chunk of the torch form, a power of two.

    Returns:
        o [B, T, H, V] in the dtype of q, and the new state, float32 or wider, or None where none was given.

    Raises:
        KernelError: Triton is to run what it does not cover.
    """
    if before is None:
        before = place.new_zeros(len(place))
    if state is not None:
        # with the token that comes next, if there is one, a pair may begin
        bits = stretches.block.bit_length() - 1
        first, last = bounds(place, before, chunk, 1)[:, 0] >> bits, (before - 1).clamp_min(0) >> bits
        level = torch.arange(stretches.count, device=place.device)
        still = first[:, None] >> level == last[:, None] >> level
        if stretches.older:
            still[:, -1] = True
        state = state * still[..., None, None, None].to(state.dtype)
    if dispatch.use_triton(q, k, v):
        from linearize.kernels.stretches.operator import stretches_triton

        return stretches_triton(q, k, v, beta, log_decay, shares, place, docs, stretches, before, state)
    dtype = q.dtype
    q, k, v, beta, log_decay, shares = at_least_float32(q, k, v, beta, log_decay, shares)
    blocks = cut_documents(docs, chunk)
    matrices = _matrices(q, k, beta, log_decay, blocks)
    cut = Cut.of(place, docs, before, blocks, stretches)
    empty = k.new_zeros(len(k), stretches.count, *k.shape[2:], v.shape[-1]) if state is None else state
    out, after = _read(matrices, v, shares, cut, blocks, stretches, empty)
    return out.to(dtype), None if state is None else after


@dataclass(frozen=True)
class Matrices:
    """What each chunk does, of any rule: C tokens of N chunks, of M heads with G queries each.

    Attributes:
        weights: W [B, N, M, C G, C].
        readers: Y [B, N, M, C G, K].
        writers: [B, N, M, K, C], N is its product with the values.
        removal: P [B, N, M, K, K], or None.
        kept: [B, N, M, K or 1, 1].
    """

    weights: Tensor
    readers: Tensor
    writers: Tensor
    removal: Tensor | None
    kept: Tensor


def _matrices(
    q: Tensor, k: Tensor, beta: Tensor | None, log_decay: Tensor | None, blocks: Blocks
) -> Matrices:
    log_decay = k.new_zeros(k.shape[:3]) if log_decay is None else log_decay
    q_cut, k_cut = blocks.cut_grouped(q, k.shape[2]), blocks.cut(k)
    decay = Decay(blocks.cut(log_decay if log_decay.dim() == 4 else log_decay[..., None]))
    visible = blocks.visible[:, :, None].to(q.dtype)
    reach = decay.from_start * blocks.entering[:, :, None, :, None].to(q.dtype)
    writers = (k_cut * decay.to_end * blocks.open[:, :, None, :, None].to(q.dtype)).mT
    group = q_cut.shape[-2]
    weights = decayed_products(q_cut, k_cut, decay) * visible.repeat_interleave(group, -2)
    readers = (q_cut * reach[..., None, :]).flatten(-3, -2)
    kept = decay.whole[..., None] * blocks.kept[:, :, None, None, None].to(q.dtype)
    if beta is None:
        return Matrices(weights, readers, writers, None, kept)
    strength = blocks.cut(beta[..., None])
    lower = strength * decayed_products(k_cut[..., None, :], k_cut, decay) * visible
    solve = torch.linalg.solve_triangular(
        lower, torch.diag_embed(strength[..., 0]), upper=False, unitriangular=True
    )
    held, weights, writers = k_cut * reach, weights @ solve, writers @ solve
    return Matrices(weights, readers - weights @ held, writers, writers @ held, kept)


@dataclass(frozen=True)
class Cut:
    """Where stretches lie in chunks.

    Attributes:
        own: [B, N, C] block of each token in its document.
        first: [B, N] that of the token that would come first in the chunk, see `bounds`.
        written: [B, N, S, C] bool, whether the token writes to the state that leaves its chunk.
        carried: [B, N, S] bool, whether what enters is still of the state when the chunk ends.
        live: [B, N, S] bool, whether queries read the state that enters.
    """

    own: Tensor
    first: Tensor
    written: Tensor
    carried: Tensor
    live: Tensor

    @classmethod
    def of(cls, place: Tensor, docs: Tensor, before: Tensor, blocks: Blocks, stretches: Stretches) -> Cut:
        """Of tokens' places."""
        bits = stretches.block.bit_length() - 1
        bound = bounds(place, before, blocks.chunk, blocks.count)
        own = blocks.cut(place.clamp_min(0)[:, :, None])[:, :, 0] >> bits
        first, following = bound[:, :-1] >> bits, bound[:, 1:] >> bits
        level = torch.arange(stretches.count, device=place.device)
        half = (level - 1).clamp_min(0)
        written = own[:, :, None] >> level[:, None] == (following[..., None] >> level)[..., None]
        written &= (own[:, :, None] >> half[:, None] & 1 == 0) | (level == 0)[:, None]
        carried = first[..., None] >> level == following[..., None] >> level
        live = (first[..., None] >> half & 1).to(torch.bool)
        live[..., 0] = bound[:, :-1] & (stretches.block - 1) != 0
        if stretches.older:
            written[:, :, -1], carried[..., -1], live[..., -1] = True, True, True
        return cls(own, first, written & blocks.open[:, :, None], carried, live)


def bounds(place: Tensor, before: Tensor, chunk: int, count: int) -> Tensor:
    """[B, N + 1] place of the token that would come first in each chunk, if it went on with the document before; last
    that of the last token, as what is carried behind it is split by its block.

    Where nothing but padding follows, no token comes, and no pair begins: there too it is that of the last token, so
    that all that a state holds is carried over padding behind a text, and over a call that has no token of a row.
    """
    tokens, last = place.shape[1], (before - 1)[:, None]
    behind = torch.cat([last, place[:, chunk - 1 : (count - 1) * chunk : chunk]], 1)
    if not tokens:
        return last.clamp_min(0).expand(-1, 2)
    # places change with every token of a document
    comes = torch.cat([last, place], 1).diff(dim=1) != 0
    read = torch.where(comes, torch.arange(1, tokens + 1, device=place.device), 0).amax(1, keepdim=True)
    follows = torch.arange(count, device=place.device) * chunk < read
    return torch.cat([behind + follows, place[:, -1:]], 1).clamp_min(0)


def _read(
    matrices: Matrices,
    v: Tensor,
    shares: Tensor,
    cut: Cut,
    blocks: Blocks,
    stretches: Stretches,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    v_cut = blocks.cut(v)
    most = shares.shape[-1] - 1
    given = blocks.cut_grouped(shares, v.shape[2])  # [B, N, M, C, G, L + 2]
    level = level_of(cut.own[..., :, None] ^ cut.own[..., None, :], most)
    inside = given.gather(-1, level[:, :, None, :, None].expand(*given.shape[:-1], -1))
    out = (matrices.weights * inside.flatten(-3, -2)) @ v_cut

    added = (matrices.writers[:, :, None] * cut.written[:, :, :, None, None].to(v.dtype)) @ v_cut[:, :, None]
    pieces = [matrices.kept, cut.carried[..., None, None, None].to(v.dtype), added]
    pieces += [] if matrices.removal is None else [matrices.removal]
    entering, after = scan(_change, state, *pieces)

    group = given.shape[-2]
    far = (cut.own >> max(most - 1, 0) > 0)[:, :, None, :, None, None]
    for at in range(stretches.count):
        begins = cut.first >> at << at
        level = level_of(cut.own ^ begins[..., None], most)
        share = given.gather(-1, level[:, :, None, :, None, None].expand(*given.shape[:-1], 1))
        if stretches.older:
            last = given[..., -1:] * far.to(given.dtype)
            share = last if at == stretches.levels else share - last
        share = share * cut.live[:, :, at, None, None, None, None].to(share.dtype)
        out = out + (matrices.readers * share.flatten(-3, -2)) @ entering[:, :, at]
    return blocks.join(out.unflatten(-2, (-1, group))), after


def _change(
    state: Tensor, kept: Tensor, carried: Tensor, added: Tensor, removal: Tensor | None = None
) -> Tensor:
    left = kept[:, None] * state
    if removal is not None:
        left = left - removal[:, None] @ state
    return carried * left + added
