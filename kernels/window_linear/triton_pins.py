"""Pinned first tokens of window_linear: what rows of queries see of them behind their windows, and their gradients.

Few keys are pinned, and the rows of a chunk may be of several documents. So each row gathers its own: what one row and
one key make of each other is a sum over registers, in float32, and no tile of keys has to be theirs. What a pinned key
gets of the queries behind its window reaches over the whole document: `pinned_parts_kernel` adds up segments of queries
side by side, `pinned_whole_kernel` the segments of each document, in a fixed order. Scores are times log2 e.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.window_linear.triton_common import document, load_rows

BEHIND: tl.constexpr = tl.constexpr(2**30)
"""Place of a pinned key that no row has."""


@triton.jit
def pinned_rows(x, at, seen, stride: tl.constexpr, columns):
    """Rows `at` [C] of a matrix, float32; zeros where not `seen`."""
    lines = at.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(x + lines, mask=seen[:, None], other=0.0).to(tl.float32)


@triton.jit
def pinned_place(pinned, j, last, owner, codes, key_tokens, batch):
    """Where each row's pinned key j stands, and whether the row sees it there: behind its window, in its document."""
    at = pinned + j
    there = (at >= 0) & (at <= last)
    return at, there & (tl.load(codes + batch * key_tokens + at, mask=there, other=-1) == owner)


@triton.jit
def pinned_top(
    asking,
    k,
    codes,
    batch,
    pinned,
    last,
    owner,
    scale,
    key_tokens,
    dims,
    k_stride: tl.constexpr,
    PINS: tl.constexpr,
):
    """Each row's largest score [C] of the pinned keys.

    Args:
        asking: [C, K].
        pinned, last, owner: [C] each row's first pinned key, last key behind its window, document.
    """
    top = tl.full([pinned.shape[0]], float("-inf"), tl.float32)
    for j in range(PINS):
        at, seen = pinned_place(pinned, j, last, owner, codes, key_tokens, batch)
        score = tl.sum(asking.to(tl.float32) * pinned_rows(k, at, seen, k_stride, dims), 1) * scale
        top = tl.maximum(top, tl.where(seen, score, float("-inf")))
    return top


@triton.jit
def add_pinned(
    asking, k, v, codes, batch, pinned, last, owner, offset, total, result, scale, key_tokens, dims, lanes,
    k_stride: tl.constexpr, v_stride: tl.constexpr, PINS: tl.constexpr,
):  # fmt: skip
    """Sum of weights [C] and result [C, BV] with the pinned keys in them, whose weights are exp2(score + offset).

    Scores are made again: a row's largest is known only now, and what they weigh would be scaled with each larger one.
    """
    for j in range(PINS):
        at, seen = pinned_place(pinned, j, last, owner, codes, key_tokens, batch)
        score = tl.sum(asking.to(tl.float32) * pinned_rows(k, at, seen, k_stride, dims), 1) * scale
        weight = tl.exp2(tl.where(seen, score + offset, float("-inf")))
        total += weight
        result += weight[:, None] * pinned_rows(v, at, seen, v_stride, lanes)
    return total, result


@triton.jit
def pinned_gradient(
    asking, incoming, k, v, codes, batch, pinned, last, owner, offset, shift, row, inside, pin_weights, pin_ds, scale,
    tokens, key_tokens, dims, values, k_stride: tl.constexpr, v_stride: tl.constexpr, PINS: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """What rows need of their pinned keys; with KEEP their weights and gradients ds of their scores are written too.

    Args:
        asking, incoming: [C, K] and [C, V].
        offset: [C], what scores need to be logarithms of weights divided by their row's sum.
        shift: [C], do . o.
        row: [C], where the row's number for pinned key 0 goes; those of the next one are `tokens` further on.

    Returns:
        The largest score, its place -2 - j, and sums of the weights and of ds, [C] each.
    """
    best = tl.full([inside.shape[0]], float("-inf"), tl.float32)
    best_place = tl.full([inside.shape[0]], -1, tl.int32)
    near_part = tl.zeros([inside.shape[0]], tl.float32)
    sum_of_ds = tl.zeros([inside.shape[0]], tl.float32)
    for j in range(PINS):
        at, seen = pinned_place(pinned, j, last, owner, codes, key_tokens, batch)
        score = tl.sum(asking.to(tl.float32) * pinned_rows(k, at, seen, k_stride, dims), 1) * scale
        score = tl.where(seen, score, float("-inf"))
        weight = tl.exp2(score + offset)
        dw = tl.sum(incoming.to(tl.float32) * pinned_rows(v, at, seen, v_stride, values), 1)
        ds = weight * (dw - shift)
        if KEEP:
            tl.store(pin_weights + row + j * tokens, weight, mask=inside)
            tl.store(pin_ds + row + j * tokens, ds, mask=inside)
        near_part += weight
        sum_of_ds += ds
        best_place = tl.where(score > best, -2 - j, best_place)
        best = tl.maximum(best, score)
    return best, best_place, near_part, sum_of_ds


@triton.jit
def pinned_to_queries(
    k, codes, batch, pinned, last, owner, for_q, sum_of_ds, best_place, row, inside, pin_ds, dasking, factor, tokens,
    key_tokens, dims, k_stride: tl.constexpr, PINS: tl.constexpr, HAS_ASKING: tl.constexpr,
):  # fmt: skip
    """for_q [C, K] with what the pinned keys add and what each row's largest score takes off, both times `factor`.

    With HAS_ASKING what belongs to pinned keys goes into rows of `dasking` instead, [C] pointers.
    """
    tl.debug_barrier()  # ds is read by other threads than wrote it
    for_pins = tl.zeros([for_q.shape[0], for_q.shape[1]], tl.float32) if HAS_ASKING else for_q
    for j in range(PINS):
        at, seen = pinned_place(pinned, j, last, owner, codes, key_tokens, batch)
        ds = tl.load(pin_ds + row + j * tokens, mask=inside, other=0.0) * factor
        for_pins += ds[:, None] * pinned_rows(k, at, seen, k_stride, dims)
    is_pinned = best_place < -1
    at = tl.where(is_pinned, pinned - 2 - best_place, best_place)
    best_key = pinned_rows(k, at, (best_place != -1) & inside, k_stride, dims)
    spare = sum_of_ds * factor
    if HAS_ASKING:
        for_pins -= tl.where(is_pinned, spare, 0.0)[:, None] * best_key
        tl.store(
            dasking[:, None] + dims[None, :], for_pins.to(dasking.dtype.element_ty), mask=inside[:, None]
        )
        return for_q - tl.where(is_pinned, 0.0, spare)[:, None] * best_key
    else:
        return for_pins - spare[:, None] * best_key


@triton.jit
def add_to_pinned(
    dk, dv, acc_k, acc_v, current, codes, batch, kv_head, key_tokens,
    kv_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PINS: tl.constexpr, PP: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of the keys pinned from `current` on; a document may have fewer tokens than are pinned."""
    order, dims, values = tl.arange(0, PP), tl.arange(0, K), tl.arange(0, V)
    at = current + order
    own = document(tl.load(codes + batch * key_tokens + current, mask=current < key_tokens, other=0))
    real = (order < PINS) & (at < key_tokens)
    real = real & (tl.load(codes + batch * key_tokens + at, mask=real, other=-1) == own)
    lines = (batch * key_tokens + at) * kv_heads + kv_head
    at_k = dk + lines[:, None] * K + dims[None, :]
    at_v = dv + lines[:, None] * V + values[None, :]
    for_k = tl.load(at_k, mask=real[:, None], other=0.0).to(tl.float32) + acc_k
    for_v = tl.load(at_v, mask=real[:, None], other=0.0).to(tl.float32) + acc_v
    tl.store(at_k, for_k.to(dk.dtype.element_ty), mask=real[:, None])
    tl.store(at_v, for_v.to(dv.dtype.element_ty), mask=real[:, None])


@triton.jit
def pinned_parts_kernel(
    asking, do, pin, codes, pin_weights, pin_ds, balance, place_of_top, parts_k, parts_v, dk, dv,
    tokens, key_tokens, prefix, segments, scale,
    heads: tl.constexpr, kv_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    PINS: tl.constexpr, PP: tl.constexpr, SEGMENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One segment of queries, of all heads that share a key: its sums for each document that it holds a part of.

    What begins and ends in the segment goes into dk and dv at once. `parts` [B, N, 2, segments, PP, K or V] float32
    keep the sums for the document that was open when the segment began, and for the one that began in it and is open
    when it ends.
    """
    segment = tl.program_id(0)
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    group: tl.constexpr = heads // kv_heads
    rows, dims, values, order = tl.arange(0, C), tl.arange(0, K), tl.arange(0, V), tl.arange(0, PP)
    first = segment * SEGMENT
    end = tl.minimum(first + SEGMENT, tokens)
    line = (batch * kv_heads + kv_head) * 2 * segments + segment
    to_k = parts_k + line * PP * K + order[:, None] * K + dims[None, :]
    to_v = parts_v + line * PP * V + order[:, None] * V + values[None, :]
    current = tl.load(pin + batch * tokens + first)
    acc_k = tl.zeros([PP, K], tl.float32)
    acc_v = tl.zeros([PP, V], tl.float32)
    for start in range(first, end, C):
        place = start + rows
        inside = place < end
        pinned = tl.load(pin + batch * tokens + place, mask=inside, other=-1)
        following = current
        while following < BEHIND:
            if following > current:
                if current >= prefix + first:
                    add_to_pinned(
                        dk,
                        dv,
                        acc_k,
                        acc_v,
                        current,
                        codes,
                        batch,
                        kv_head,
                        key_tokens,
                        kv_heads,
                        K,
                        V,
                        PINS,
                        PP,
                    )
                else:
                    tl.store(to_k, acc_k)
                    tl.store(to_v, acc_v)
                acc_k = tl.zeros([PP, K], tl.float32)
                acc_v = tl.zeros([PP, V], tl.float32)
            # a copy, `current = following`, would not leave the loop: the compiler sees a variable change by its value,
            # and both begin as one
            current = tl.maximum(current, following)
            mine = pinned == current
            for member in range(group):
                head = kv_head * group + member
                row = (batch * heads + head) * tokens + place
                pair = ((batch * heads + head) * PINS + order[:, None]) * tokens + place[None, :]
                real = (order < PINS)[:, None] & mine[None, :]
                weights = tl.load(pin_weights + pair, mask=real, other=0.0)
                ds = tl.load(pin_ds + pair, mask=real, other=0.0)
                spare = tl.load(balance + row, mask=mine, other=0.0)
                top = tl.load(place_of_top + row, mask=mine, other=-1)
                ds -= tl.where(top[None, :] == -2 - order[:, None], spare[None, :], 0.0)
                x = load_rows(asking + (batch * tokens * heads + head) * K, start, rows, heads * K, dims, end)
                acc_k = tl.dot((ds * scale).to(x.dtype), x, acc_k, input_precision=PRECISION)
                y = load_rows(do + (batch * tokens * heads + head) * V, start, rows, heads * V, values, end)
                acc_v = tl.dot(weights.to(y.dtype), y, acc_v, input_precision=PRECISION)
            following = tl.min(tl.where(pinned > current, pinned, BEHIND), 0)
    if current >= prefix + first:
        to_k += segments * PP * K
        to_v += segments * PP * V
    tl.store(to_k, acc_k)
    tl.store(to_v, acc_v)


@triton.jit
def pinned_whole_kernel(
    pin, codes, parts_k, parts_v, dk, dv, tokens, key_tokens, prefix, segments,
    kv_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PINS: tl.constexpr, PP: tl.constexpr,
    SEGMENT: tl.constexpr,
):  # fmt: skip
    """The document that began in one segment and was open at its end, or, in program 0, the one before all of them."""
    segment = tl.program_id(0) - 1
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    dims, values, order = tl.arange(0, K), tl.arange(0, V), tl.arange(0, PP)
    last = tl.maximum(tl.minimum((segment + 1) * SEGMENT, tokens) - 1, 0)
    current = tl.load(pin + batch * tokens + last)
    began = prefix + segment * SEGMENT
    wanted = tl.where(segment < 0, current < prefix, current >= began)
    line = (batch * kv_heads + kv_head) * 2 * segments
    from_k = parts_k + line * PP * K + order[:, None] * K + dims[None, :]
    from_v = parts_v + line * PP * V + order[:, None] * V + values[None, :]
    if wanted:
        own = segments + tl.maximum(segment, 0)
        there = (order < tl.where(segment < 0, 0, PINS))[:, None]
        acc_k = tl.load(from_k + own * PP * K, mask=there, other=0.0)
        acc_v = tl.load(from_v + own * PP * V, mask=there, other=0.0)
        for later in range(segment + 1, segments):
            goes_on = tl.load(pin + batch * tokens + later * SEGMENT) == current
            there = (order < tl.where(goes_on, PINS, 0))[:, None]
            acc_k += tl.load(from_k + later * PP * K, mask=there, other=0.0)
            acc_v += tl.load(from_v + later * PP * V, mask=there, other=0.0)
        add_to_pinned(
            dk, dv, acc_k, acc_v, current, codes, batch, kv_head, key_tokens, kv_heads, K, V, PINS, PP
        )
