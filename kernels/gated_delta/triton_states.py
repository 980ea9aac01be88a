"""States between chunks, from left to right, and their gradients, from right to left: the only loop over chunks.

A chunk takes the state S that enters it to kept S - P S + N: P [K, K] is what its tokens take away, N [K, V] what they
write. One product a chunk, and its transposed mirror kept E - P^T E + R gives the gradients, with the same P. What is
stored is -P, which the product adds to what it starts from. What is kept is one number a chunk, or one a key dimension
(generalized_delta): in either case in float32 beside P, for many factors just below one would be lost in 16 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_kept(kept, at, dims, K: tl.constexpr, PER_KEY: tl.constexpr):
    """The decay over a chunk, to be multiplied with a state."""
    if PER_KEY:
        return tl.load(kept + at * K + dims)[:, None]
    else:
        return tl.load(kept + at)


@triton.jit(do_not_specialize=["chunks"])
def states_kernel(
    removal, kept, start, states, final, chunks,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, HAS_START: tl.constexpr, PER_KEY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns of one head: reads N from `states` [B, M, chunks, K, V] and writes the entering state in its place.

    REVERSE: reads R, writes the gradient of the state that leaves; `start` is the gradient of the final state, `final`
    that of the carried one. `kept` has a decay a chunk, PER_KEY one for every key dimension of it.
    """
    parts: tl.constexpr = V // BV
    part = tl.program_id(0) % parts
    row_head = (tl.program_id(0) // parts).to(tl.int64)
    dims, values = tl.arange(0, K), part * BV + tl.arange(0, BV)
    place = dims[:, None] * V + values[None, :]
    square = dims[None, :] * K + dims[:, None] if REVERSE else dims[:, None] * K + dims[None, :]
    state = tl.zeros([K, BV], tl.float32)
    if HAS_START:
        state = tl.load(start + row_head * K * V + place)
    # what a chunk writes and keeps is fetched one chunk ahead: the compiler does so for operands of products alone
    chunk = chunks - 1 if REVERSE else 0
    at = row_head * chunks + chunk
    written = tl.load(states + at * K * V + place)
    decay = load_kept(kept, at, dims, K, PER_KEY)
    for step in range(0, chunks):
        chunk = chunks - 1 - step if REVERSE else step
        at = row_head * chunks + chunk
        following = row_head * chunks + (
            tl.maximum(chunk - 1, 0) if REVERSE else tl.minimum(chunk + 1, chunks - 1)
        )
        written_next = tl.load(states + following * K * V + place)
        decay_next = load_kept(kept, following, dims, K, PER_KEY)
        taken = tl.load(removal + at * K * K + square)
        entering = state.to(states.dtype.element_ty)
        tl.store(states + at * K * V + place, entering)
        state = tl.dot(taken, entering, state * decay + written.to(tl.float32), input_precision=PRECISION)
        written, decay = written_next, decay_next
    tl.store(final + row_head * K * V + place, state)
