"""What the Triton kernels of generalized_delta share: the documents and the decays of a chunk."""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.gated_delta.triton_common import load_columns, load_documents, load_ends, load_rows
from linearize.kernels.gated_linear.triton_levels import column_exponents, in_base_two, row_exponents


@triton.jit
def chunk_documents(docs, batch, first, rows, tokens):
    """Of each token of a chunk where its document begins and ends in it, and whether it is open before and after.

    The last of the five says whether one document is open from end to end.
    """
    C: tl.constexpr = rows.shape[0]
    document = load_documents(docs, batch, first, rows, tokens)
    before, after = load_ends(docs, batch, first, tokens, C)
    # as numbers of rows alone: comparing documents where they are needed would keep one a column in registers too
    begin = tl.sum((document[None, :] < document[:, None]).to(tl.int32), 1)
    end = tl.sum((document[None, :] <= document[:, None]).to(tl.int32), 1)
    entering = tl.where(document == before, 1.0, 0.0)
    leaving = tl.where(document == after, 1.0, 0.0)
    return begin, end, entering, leaving, tl.where(before == after, 1.0, 0.0)


@triton.jit
def earlier(begin, rows, STRICT: tl.constexpr):
    """Which (reader, writer) of a chunk meet: the writer is not behind the reader, nor its equal if STRICT."""
    return (rows[:, None] - rows[None, :] >= STRICT) & (rows[None, :] >= begin[:, None])


@triton.jit
def later(end, rows, STRICT: tl.constexpr):
    """The same transposed: which (writer, reader) meet."""
    return (rows[None, :] - rows[:, None] >= STRICT) & (rows[None, :] < end[:, None])


@triton.jit
def met(passed, g, first, rows, stride, dims, tokens, STRICT: tl.constexpr):
    """Log decays up to and with each row -> those that a reader has met: an a (STRICT) not its own, a q its own too."""
    if STRICT:
        passed -= in_base_two(load_rows(g, first, rows, stride, dims, tokens))
    return passed


@triton.jit
def reader_factors(g, first, rows, stride, dims, tokens, STRICT: tl.constexpr):
    """Of a chunk that is not halved, [C, dims]: decays from its middle to its readers.

    STRICT: an a, whose state has not met the a's own decay; else a q.
    """
    decays = in_base_two(load_rows(g, first, rows, stride, dims, tokens))
    passed, _early = row_exponents(decays, rows, rows.shape[0])
    if STRICT:
        passed -= decays
    return tl.exp2(passed)


@triton.jit
def turned_writer_factors(g, first, rows, stride, dims, tokens):
    """And from its writers to its middle, [dims, C]."""
    return tl.exp2(
        -column_exponents(
            in_base_two(load_columns(g, first, rows, stride, dims, tokens)), rows, rows.shape[0]
        )
    )


@triton.jit
def decays_from_start(g, first, rows, stride, dims, tokens, STRICT: tl.constexpr):
    """Of any chunk, [C, dims]: decays from its start to its readers."""
    decays = in_base_two(load_rows(g, first, rows, stride, dims, tokens))
    passed, early = row_exponents(decays, rows, rows.shape[0])
    if STRICT:
        passed -= decays
    return tl.exp2(tl.minimum(passed + early[None, :], 0.0))


@triton.jit
def summed(sums, rows, dims, K: tl.constexpr, STRICT: tl.constexpr):
    """Log decays of a chunk from its middle up to each reader, [C, dims], as `reader_kernel` wrote them down.

    STRICT: an a, whose state has not met the a's own decay; else a q, and what a writer's is met with.
    """
    place = rows + (0 if STRICT else 1)
    return tl.load(sums + place[:, None] * K + dims[None, :])


@triton.jit
def since_start(sums, rows, dims, K: tl.constexpr, STRICT: tl.constexpr):
    """Of any chunk, [C, dims]: decays from its start to its readers."""
    start = tl.load(sums + dims)
    return tl.exp2(tl.minimum(summed(sums, rows, dims, K, STRICT) - start[None, :], 0.0))


@triton.jit
def until_end(sums, rows, dims, K: tl.constexpr):
    """And from its writers to its end."""
    end = tl.load(sums + rows.shape[0] * K + dims)
    return tl.exp2(tl.minimum(end[None, :] - summed(sums, rows, dims, K, False), 0.0))


@triton.jit
def turned_decays_to_end(g, first, rows, stride, dims, tokens):
    """Of any chunk, [dims, C]: decays from its writers to its end."""
    decays = in_base_two(load_columns(g, first, rows, stride, dims, tokens))
    passed = column_exponents(decays, rows, rows.shape[0])
    late = tl.sum(tl.where((rows >= rows.shape[0] // 2)[None, :], decays, 0.0), 1)
    return tl.exp2(tl.minimum(late[:, None] - passed, 0.0))


@triton.jit
def entered(x, g, entering, first, rows, own_stride, stride, dims, tokens, STRICT: tl.constexpr):
    """Readers x with the decay since the chunk's start, float32; zero in later documents."""
    tile = load_rows(x, first, rows, own_stride, dims, tokens).to(tl.float32)
    return tile * decays_from_start(g, first, rows, stride, dims, tokens, STRICT) * entering[:, None]


@triton.jit
def turned_left(x, g, leaving, first, rows, stride, dims, tokens):
    """Writers x with the decay to the chunk's end, [dims, C] float32; zero in earlier documents."""
    tile = load_columns(x, first, rows, stride, dims, tokens).to(tl.float32)
    return tile * turned_decays_to_end(g, first, rows, stride, dims, tokens) * leaving[None, :]
