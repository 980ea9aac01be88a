"""Backward kernel of short_conv: every gradient in one launch, the pre-activation made again from the inputs.

A program owns `SPAN` tokens of a block of channels as *inputs*: dx_s = sum_k w_{W-1-k} da_{s+k} and
dw_{W-1-k} = sum_s x_s da_{s+k}, with a the convolution's result before the activation. da at the W tokens from s on
needs 2 W - 1 rows of x around s, which the first level cache holds. Sums over tokens are written by each program and
added afterwards in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.short_conv.triton_common import document, load_codes, load_rows


@triton.jit
def backward_tiles(
    x, weight, bias, start, dy, dfinal, dx, dstart, partial, codes, row, block, tokens, channels,
    TAPS: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_START: tl.constexpr, HAS_CODES: tl.constexpr,
    SILU: tl.constexpr, RESIDUAL: tl.constexpr, HAS_FINAL: tl.constexpr, START_GRADIENT: tl.constexpr,
    SPAN: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """`SPAN` tokens of one stream in tiles [BT, BC]; row r < W of `partial` is dw of tap r, row W is dbias."""
    batch = tl.program_id(2).to(tl.int64)
    x += batch * tokens * channels
    dy += batch * tokens * channels
    dx += batch * tokens * channels
    if HAS_START:
        start += batch * (TAPS - 1) * channels
    if HAS_CODES:
        codes += batch * tokens
    columns = block * BC + tl.arange(0, BC)
    lanes = columns < channels
    rows = tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, BC], dtype=tl.float32)
    first = row * SPAN
    if HAS_START:  # the carried inputs are inputs too: they have a share in dw, and gradients of their own
        first -= TAPS - 1
    tiles = tl.cdiv(tl.minimum(tokens - first, SPAN), BT)
    for tile in range(0, tiles):
        base = first + tile * BT
        positions = base + tl.arange(0, BT)
        value = load_rows(x, start, base, positions, columns, tokens, channels, TAPS, HAS_START)
        own_code = positions
        if HAS_CODES:
            own_code = load_codes(codes, positions, tokens)
        gradient = tl.zeros([BT, BC], dtype=tl.float32)
        for ahead in tl.static_range(TAPS):
            reader = positions + ahead
            inside = (reader >= 0) & (reader < tokens)
            da = load_rows(dy, dy, base, reader, columns, tokens, channels, TAPS, False)
            if RESIDUAL and ahead == 0:
                gradient += da
            reader_document = reader
            if HAS_CODES:
                reader_document = document(load_codes(codes, reader, tokens))
            if SILU:
                a = tl.zeros([BT, BC], dtype=tl.float32)
                if HAS_BIAS:
                    a += tl.load(bias + columns, mask=lanes, other=0.0).to(tl.float32)[None, :]
                for tap in tl.static_range(TAPS):
                    read = positions + (ahead + tap + 1 - TAPS)
                    other = load_rows(x, start, base, read, columns, tokens, channels, TAPS, HAS_START)
                    if HAS_CODES:
                        code = load_codes(codes, read, tokens)
                        other = tl.where((code == reader_document)[:, None], other, 0.0)
                    factor = tl.load(weight + columns * TAPS + tap, mask=lanes, other=0.0).to(tl.float32)
                    a += other * factor[None, :]
                gate = tl.sigmoid(a)
                da = da * gate * (1.0 + a * (1.0 - gate))
            if HAS_BIAS and ahead == 0:
                sums += tl.where(rows == TAPS, 1.0, 0.0)[:, None] * tl.sum(da, 0)[None, :]
            if HAS_CODES:
                da = tl.where((inside & (own_code == reader_document))[:, None], da, 0.0)
            factor = tl.load(weight + columns * TAPS + (TAPS - 1 - ahead), mask=lanes, other=0.0).to(
                tl.float32
            )
            gradient += da * factor[None, :]
            sums += tl.where(rows == TAPS - 1 - ahead, 1.0, 0.0)[:, None] * tl.sum(da * value, 0)[None, :]
        if HAS_FINAL:
            kept = positions - (tokens + 1 - TAPS)
            mine = (kept >= 0) & (kept < TAPS - 1)
            if HAS_CODES:
                mine = mine & (own_code == document(tl.load(codes + tokens - 1)))
            places = batch * (TAPS - 1) * channels + kept[:, None] * channels + columns[None, :]
            gradient += tl.load(dfinal + places, mask=mine[:, None] & lanes[None, :], other=0.0).to(
                tl.float32
            )
        if HAS_CODES:
            gradient = tl.where((own_code >= 0)[:, None], gradient, 0.0)
        places = tl.cast(base, tl.int64) * channels + tl.arange(0, BT)[:, None] * channels + columns[None, :]
        stored = ((positions >= 0) & (positions < tokens))[:, None] & lanes[None, :]
        tl.store(dx + places, gradient.to(dx.dtype.element_ty), mask=stored)
        if START_GRADIENT:
            places = (
                batch * (TAPS - 1) * channels
                + (positions + (TAPS - 1))[:, None] * channels
                + columns[None, :]
            )
            stored = (positions < 0)[:, None] & lanes[None, :]
            tl.store(dstart + places, gradient.to(dstart.dtype.element_ty), mask=stored)
    written = (batch * tl.num_programs(1) + row) * (TAPS + HAS_BIAS)
    places = (written + rows[:, None]) * channels + columns[None, :]
    tl.store(partial + places, sums, mask=(rows < TAPS + HAS_BIAS)[:, None] & lanes[None, :])


@triton.jit
def backward_kernel(
    x0, weight0, bias0, start0, dy0, dfinal0, dx0, dstart0, partial0, channels0, blocks0,
    x1, weight1, bias1, start1, dy1, dfinal1, dx1, dstart1, partial1, channels1, blocks1,
    x2, weight2, bias2, start2, dy2, dfinal2, dx2, dstart2, partial2, channels2,
    codes, tokens,
    STREAMS: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_START: tl.constexpr,
    HAS_CODES: tl.constexpr, SILU: tl.constexpr, RESIDUAL: tl.constexpr, HAS_FINAL: tl.constexpr,
    START_GRADIENT: tl.constexpr, SPAN: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid (channel blocks of all streams, spans, batch); see `forward_kernel` for the branches."""
    block, row = tl.program_id(0), tl.program_id(1)
    if STREAMS == 1:
        backward_tiles(x0, weight0, bias0, start0, dy0, dfinal0, dx0, dstart0, partial0, codes, row, block, tokens,
                       channels0, TAPS, ROWS, HAS_BIAS, HAS_START, HAS_CODES, SILU, RESIDUAL, HAS_FINAL,
                       START_GRADIENT, SPAN, BT, BC)  # fmt: skip
    else:
        if block < blocks0:
            backward_tiles(x0, weight0, bias0, start0, dy0, dfinal0, dx0, dstart0, partial0, codes, row, block,
                           tokens, channels0, TAPS, ROWS, HAS_BIAS, HAS_START, HAS_CODES, SILU, RESIDUAL, HAS_FINAL,
                           START_GRADIENT, SPAN, BT, BC)  # fmt: skip
        else:
            if STREAMS == 2:
                backward_tiles(x1, weight1, bias1, start1, dy1, dfinal1, dx1, dstart1, partial1, codes, row,
                               block - blocks0, tokens, channels1, TAPS, ROWS, HAS_BIAS, HAS_START, HAS_CODES, SILU,
                               RESIDUAL, HAS_FINAL, START_GRADIENT, SPAN, BT, BC)  # fmt: skip
            else:
                if block < blocks0 + blocks1:
                    backward_tiles(x1, weight1, bias1, start1, dy1, dfinal1, dx1, dstart1, partial1, codes, row,
                                   block - blocks0, tokens, channels1, TAPS, ROWS, HAS_BIAS, HAS_START, HAS_CODES,
                                   SILU, RESIDUAL, HAS_FINAL, START_GRADIENT, SPAN, BT, BC)  # fmt: skip
                else:
                    backward_tiles(x2, weight2, bias2, start2, dy2, dfinal2, dx2, dstart2, partial2, codes, row,
                                   block - blocks0 - blocks1, tokens, channels2, TAPS, ROWS, HAS_BIAS, HAS_START,
                                   HAS_CODES, SILU, RESIDUAL, HAS_FINAL, START_GRADIENT, SPAN, BT, BC)  # fmt: skip
