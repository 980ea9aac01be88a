"""What the kernels with a decay for every key dimension share: decays to a chunk's ends, pairs of tokens, documents.

Each decay is a sum of its own terms, at most zero before it is exponentiated, so nothing overflows and a weak decay
behind a strong one keeps its digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.gated_delta.triton_common import (
    load_columns,
    load_documents,
    load_ends,
    load_rows,
)
from linearize.kernels.gated_linear.triton_common import in_halves
from linearize.kernels.gated_linear.triton_levels import (
    CAP,
    column_exponents,
    column_sums,
    count_halvings,
    in_base_two,
    level_pairs,
    row_exponents,
    row_sums,
    strongest,
)


@triton.jit
def start_rows(g, first, rows, stride, dims, tokens):
    """Decays from a chunk's start up to and with each token, [C, dims]."""
    return tl.exp2(tl.cumsum(in_base_two(load_rows(g, first, rows, stride, dims, tokens)), 0))


@triton.jit
def start_columns(g, first, rows, stride, dims, tokens):
    """The same transposed, [dims, C]."""
    return tl.exp2(tl.cumsum(in_base_two(load_columns(g, first, rows, stride, dims, tokens)), 1))


@triton.jit
def end_rows(g, first, rows, stride, dims, tokens, C: tl.constexpr):
    """Decays from behind each token to the chunk's end, [C, dims]."""
    later = in_base_two(load_rows(g, first + 1, rows, stride, dims, tokens))
    return tl.exp2(tl.cumsum(tl.where((rows + 1 < C)[:, None], later, 0.0), 0, reverse=True))


@triton.jit
def end_columns(g, first, rows, stride, dims, tokens, C: tl.constexpr):
    """The same transposed, [dims, C]."""
    later = in_base_two(load_columns(g, first + 1, rows, stride, dims, tokens))
    return tl.exp2(tl.cumsum(tl.where((rows + 1 < C)[None, :], later, 0.0), 1, reverse=True))


@triton.jit
def load_bounds(docs, batch, first, rows, tokens, C: tl.constexpr):
    """Of each token the rows where its document begins and ends, and whether it enters and leaves the chunk (1, 0)."""
    document = load_documents(docs, batch, first, rows, tokens)
    before, after = load_ends(docs, batch, first, tokens, C)
    begin = tl.sum((document[None, :] < document[:, None]).to(tl.int32), 1)
    end = tl.sum((document[None, :] <= document[:, None]).to(tl.int32), 1)
    return begin, end, tl.where(document == before, 1.0, 0.0), tl.where(document == after, 1.0, 0.0)


@triton.jit
def sees_earlier(begin, rows, strict):
    """[reader, writer]: a token of the reader's document that is not behind it; if strict (1, not 0) not itself."""
    return (rows[:, None] - rows[None, :] >= strict) & (rows[None, :] >= begin[:, None])


@triton.jit
def seen_later(end, rows, strict):
    """[writer, reader]: the same transposed."""
    return (rows[None, :] - rows[:, None] >= strict) & (rows[None, :] < end[:, None])


@triton.jit
def halvings_of(g, first, rows, stride, tokens, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr):
    """How often a chunk must be halved, by the strongest of K dimensions; see gated_linear's `triton_levels`."""
    token, half = 0.0, 0.0
    for part in range(K // BK):
        decays = in_base_two(load_rows(g, first, rows, stride, part * BK + tl.arange(0, BK), tokens))
        by_token, by_half = strongest(decays, rows, C)
        token, half = tl.maximum(token, by_token), tl.maximum(half, by_half)
    return count_halvings(token, half)


@triton.jit
def whole_pairs(
    a, b, g, first, rows, a_stride, b_stride, tokens,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a_t . diag(decay from s to t) b_s, right for every s up to t, [C, C], of a chunk that need not be halved.

    Decays g have the stride of b.
    """
    found = tl.zeros([C, C], tl.float32)
    for part in range(K // BK):
        dims = part * BK + tl.arange(0, BK)
        passed, _ = row_exponents(in_base_two(load_rows(g, first, rows, b_stride, dims, tokens)), rows, C)
        own = load_rows(a, first, rows, a_stride, dims, tokens).to(tl.float32) * tl.exp2(passed)
        passed = column_exponents(in_base_two(load_columns(g, first, rows, b_stride, dims, tokens)), rows, C)
        other = load_columns(b, first, rows, b_stride, dims, tokens).to(tl.float32) * tl.exp2(-passed)
        found = tl.dot(own.to(OPERAND), other.to(OPERAND), found, input_precision=PRECISION)
    return found


@triton.jit
def halved_pairs(
    a, b, g, first, rows, a_stride, b_stride, tokens, levels,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same of a chunk that is halved `levels` times."""
    scores = tl.zeros([C, C], tl.float32)
    for level in range(0, levels + 1):
        # always `rows`, but the compiler does not know it: nothing of a level may wait for it in registers
        lanes = rows + (level >> 3)
        pairs, middle = level_pairs(lanes, 6 - level, level == levels, True, False)
        found = tl.zeros([C, C], tl.float32)
        for part in range(K // BK):
            dims = part * BK + tl.arange(0, BK)
            high, low = in_halves(in_base_two(load_rows(g, first, lanes, b_stride, dims, tokens)))
            up = tl.exp2(tl.minimum(row_sums(high, low, lanes, middle, lanes), CAP))
            own = load_rows(a, first, lanes, a_stride, dims, tokens).to(tl.float32) * up
            tl.debug_barrier()  # the other tile is not loaded before there are registers for it
            high, low = in_halves(in_base_two(load_columns(g, first, lanes, b_stride, dims, tokens)))
            down = tl.exp2(tl.minimum(-column_sums(high, low, lanes, middle, lanes), CAP))
            other = load_columns(b, first, lanes, b_stride, dims, tokens).to(tl.float32) * down
            found = tl.dot(own.to(OPERAND), other.to(OPERAND), found, input_precision=PRECISION)
        scores = tl.where(pairs, found, scores)
        tl.debug_barrier()  # nor the next level's
    return scores
