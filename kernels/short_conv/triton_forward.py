"""Forward kernel of short_conv: up to three streams of unlike widths in one launch, tiles of tokens and channels."""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.short_conv.triton_common import document, load_codes, load_rows


@triton.jit
def forward_tile(
    x, weight, bias, start, y, final, codes, row, block, tokens, channels,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_START: tl.constexpr, HAS_CODES: tl.constexpr,
    SILU: tl.constexpr, RESIDUAL: tl.constexpr, HAS_FINAL: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One tile [BT, BC] of one stream; the last tile of a sequence also writes its new state."""
    batch = tl.program_id(2).to(tl.int64)
    x += batch * tokens * channels
    y += batch * tokens * channels
    if HAS_START:
        start += batch * (TAPS - 1) * channels
    if HAS_CODES:
        codes += batch * tokens
    columns = block * BC + tl.arange(0, BC)
    lanes = columns < channels
    base = row * BT
    positions = base + tl.arange(0, BT)
    total = tl.zeros([BT, BC], dtype=tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=lanes, other=0.0).to(tl.float32)[None, :]
    own_document = positions
    if HAS_CODES:
        own_document = document(load_codes(codes, positions, tokens))
    for tap in tl.static_range(TAPS):
        seen = positions + (tap + 1 - TAPS)
        value = load_rows(x, start, base, seen, columns, tokens, channels, TAPS, HAS_START)
        if HAS_CODES:
            code = load_codes(codes, seen, tokens)
            # a code is its own document's number unless it is negative: equality also leaves out padding
            value = tl.where((code == own_document)[:, None], value, 0.0)
        factor = tl.load(weight + columns * TAPS + tap, mask=lanes, other=0.0).to(tl.float32)
        total += value * factor[None, :]
        if tap == TAPS - 1:
            own = value
    if SILU:
        total = total * tl.sigmoid(total)
    if RESIDUAL:
        total += own
    places = tl.cast(base, tl.int64) * channels + tl.arange(0, BT)[:, None] * channels + columns[None, :]
    tl.store(y + places, total.to(y.dtype.element_ty), mask=(positions < tokens)[:, None] & lanes[None, :])
    if HAS_FINAL:  # noqa: SIM102  # one known when compiling, one not
        if row == tl.num_programs(1) - 1:
            final += batch * (TAPS - 1) * channels
            for index in tl.static_range(TAPS - 1):
                position = tokens + (index + 1 - TAPS)
                carried = lanes & (position + tl.zeros([BC], tl.int32) < 0)
                there = lanes & (position + tl.zeros([BC], tl.int32) >= 0)
                last = tl.load(x + tl.cast(position, tl.int64) * channels + columns, mask=there, other=0.0)
                last = last.to(tl.float32)
                if HAS_START:
                    past = tl.load(
                        start + (position + (TAPS - 1)) * channels + columns, mask=carried, other=0.0
                    )
                    last += past.to(tl.float32)
                if HAS_CODES:
                    code = tl.load(codes + position + tl.zeros([BC], tl.int32), mask=there, other=0)
                    last = tl.where(code == document(tl.load(codes + tokens - 1)), last, 0.0)
                tl.store(final + index * channels + columns, last.to(final.dtype.element_ty), mask=lanes)


@triton.jit
def forward_kernel(
    x0, weight0, bias0, start0, y0, final0, channels0, blocks0,
    x1, weight1, bias1, start1, y1, final1, channels1, blocks1,
    x2, weight2, bias2, start2, y2, final2, channels2,
    codes, tokens,
    STREAMS: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_START: tl.constexpr,
    HAS_CODES: tl.constexpr, SILU: tl.constexpr, RESIDUAL: tl.constexpr, HAS_FINAL: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid (channel blocks of all streams, token tiles, batch). Absent streams are None and take no part in the grid.

    The body stands once for each stream: chosen pointers would hide from the compiler how they are aligned.
    """
    block, row = tl.program_id(0), tl.program_id(1)
    if STREAMS == 1:
        forward_tile(x0, weight0, bias0, start0, y0, final0, codes, row, block, tokens, channels0,
                     TAPS, HAS_BIAS, HAS_START, HAS_CODES, SILU, RESIDUAL, HAS_FINAL, BT, BC)  # fmt: skip
    else:
        if block < blocks0:
            forward_tile(x0, weight0, bias0, start0, y0, final0, codes, row, block, tokens, channels0,
                         TAPS, HAS_BIAS, HAS_START, HAS_CODES, SILU, RESIDUAL, HAS_FINAL, BT, BC)  # fmt: skip
        else:
            if STREAMS == 2:
                forward_tile(x1, weight1, bias1, start1, y1, final1, codes, row, block - blocks0, tokens, channels1,
                             TAPS, HAS_BIAS, HAS_START, HAS_CODES, SILU, RESIDUAL, HAS_FINAL, BT, BC)  # fmt: skip
            else:
                if block < blocks0 + blocks1:
                    forward_tile(x1, weight1, bias1, start1, y1, final1, codes, row, block - blocks0, tokens,
                                 channels1, TAPS, HAS_BIAS, HAS_START, HAS_CODES, SILU, RESIDUAL, HAS_FINAL,
                                 BT, BC)  # fmt: skip
                else:
                    forward_tile(x2, weight2, bias2, start2, y2, final2, codes, row, block - blocks0 - blocks1,
                                 tokens, channels2, TAPS, HAS_BIAS, HAS_START, HAS_CODES, SILU, RESIDUAL, HAS_FINAL,
                                 BT, BC)  # fmt: skip
