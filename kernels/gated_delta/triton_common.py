"""What the Triton kernels of gated_delta share: a chunk's tiles, its strengths, its decays and its documents."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(x, first, rows, stride, columns, count):
    """Rows `first + rows` of a [count, columns] matrix with row stride `stride`; zeros outside."""
    x += tl.cast(first, tl.int64) * stride
    return tl.load(
        x + rows[:, None] * stride + columns[None, :], mask=(first + rows < count)[:, None], other=0.0
    )


@triton.jit
def load_columns(x, first, rows, stride, columns, count):
    """The same tile transposed: [columns, rows]."""
    x += tl.cast(first, tl.int64) * stride
    return tl.load(
        x + rows[None, :] * stride + columns[:, None], mask=(first + rows < count)[None, :], other=0.0
    )


@triton.jit
def store_rows(x, first, rows, stride, columns, count, tile):
    """Write the rows of `load_rows`."""
    x += tl.cast(first, tl.int64) * stride
    kind = x.dtype.element_ty
    tl.store(
        x + rows[:, None] * stride + columns[None, :], tile.to(kind), mask=(first + rows < count)[:, None]
    )


@triton.jit
def load_scalars(x, batch, first, rows, tokens, heads, head):
    """One number a token of a [B, T, M] tensor, float32; zero outside."""
    x += (batch * tokens + first) * heads + head
    return tl.load(x + rows * heads, mask=first + rows < tokens, other=0.0).to(tl.float32)


@triton.jit
def store_scalars(x, batch, first, rows, tokens, heads, head, values):
    """Write the numbers of `load_scalars`."""
    x += (batch * tokens + first) * heads + head
    tl.store(x + rows * heads, values.to(x.dtype.element_ty), mask=first + rows < tokens)


@triton.jit
def load_documents(docs, batch, first, rows, tokens):
    """Document of each token; what lies behind the last token belongs to its document."""
    return tl.load(docs + batch * tokens + tl.minimum(first + rows, tokens - 1))


@triton.jit
def load_ends(docs, batch, first, tokens, C: tl.constexpr):
    """The documents open before a chunk and at its end; before the first token it is document 0."""
    before = tl.load(docs + batch * tokens + first - 1, mask=first > 0, other=0)
    return before, tl.load(docs + batch * tokens + tl.minimum(first + C, tokens) - 1)


@triton.jit
def load_decays(
    log_decay, docs, batch, head, first, rows, tokens, heads, C: tl.constexpr, HAS_DECAY: tl.constexpr
):
    """Of each token of a chunk, where its document begins and ends in it, and its decays.

    The latter are the base-2 logarithm of the decay since the chunk's start, that decay, and the decay to the chunk's
    end, both zero where a document boundary lies between.
    """
    document = load_documents(docs, batch, first, rows, tokens)
    before, after = load_ends(docs, batch, first, tokens, C)
    # as numbers of rows alone: comparing documents where they are needed would keep one a column in registers too
    begin = tl.sum((document[None, :] < document[:, None]).to(tl.int32), 1)
    end = tl.sum((document[None, :] <= document[:, None]).to(tl.int32), 1)
    total = tl.zeros([C], tl.float32)
    from_start = tl.where(document == before, 1.0, 0.0)
    to_end = tl.where(document == after, 1.0, 0.0)
    if HAS_DECAY:
        step = load_scalars(log_decay, batch, first, rows, tokens, heads, head) * LOG2E
        total = tl.cumsum(step, 0)
        from_start *= tl.exp2(total)
        to_end *= tl.exp2(tl.minimum(tl.sum(step, 0) - total, 0.0))
    return begin, end, total, from_start, to_end


@triton.jit
def decays_to_earlier(begin, total, rows, STRICT: tl.constexpr, HAS_DECAY: tl.constexpr):
    """[reader, writer]: the decay from a token to a later one of its document, else zero; not to itself if STRICT."""
    seen = (rows[:, None] - rows[None, :] >= STRICT) & (rows[None, :] >= begin[:, None])
    if HAS_DECAY:
        return tl.exp2(tl.where(seen, total[:, None] - total[None, :], float("-inf")))
    return tl.where(seen, 1.0, 0.0)


@triton.jit
def decays_to_later(end, total, rows, STRICT: tl.constexpr, HAS_DECAY: tl.constexpr):
    """[writer, reader]: the same transposed, so that no product has to be."""
    seen = (rows[None, :] - rows[:, None] >= STRICT) & (rows[None, :] < end[:, None])
    if HAS_DECAY:
        return tl.exp2(tl.where(seen, total[None, :] - total[:, None], float("-inf")))
    return tl.where(seen, 1.0, 0.0)
