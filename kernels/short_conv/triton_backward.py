"""Backward kernel of short_conv: every gradient in one launch, one pass over x and dy, da never leaves registers.

With a the convolution's result before the activation and da = dy act'(a): dx_s = sum_k w_{W-1-k} da_{s+k} and
dw_{W-1-k} = sum_t x_{t-k} da_t. A program takes the tokens of a span of a block of channels in order and makes a and
da once at each. What it keeps of the tokens before is the last W - 1 inputs and the W - 1 gradients dx whose readers
have not all come: each token costs one row of x and one of dy read, and one row of dx written.

A program's tile is one row of channels, so positions, document codes and bounds are scalars, sums over tokens stay in
the thread that made them, and no tile changes its layout. Rows are asked for a group ahead: that is what keeps enough
bytes on their way, because no load may move up across a store.
"""

# Triton knows neither (*values, value) nor annotations of local names: tuples of rows grow by addition, unannotated.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.short_conv.triton_common import document, load_codes


@triton.jit
def load_carried(start, position, columns, channels, TAPS: tl.constexpr):
    """Carried input `position` < 0 [C] float32; zeros for a position that has none."""
    carried = columns < tl.where((position < 0) & (position >= 1 - TAPS), channels, 0)
    places = (position + (TAPS - 1)) * channels + columns
    return tl.load(start + places, mask=carried, other=0.0).to(tl.float32)


@triton.jit
def load_group(
    x, start, dy, codes, first, position, end, columns, tokens, channels,
    TAPS: tl.constexpr, HAS_START: tl.constexpr, HAS_CODES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x and dy of the `GROUP` tokens from `position` on, each [C], and their codes (none without documents).

    `x` and `dy` point at row `first` of the sequence; from `end` on there are zeros. Bounds, which are scalars, go into
    the number of columns: masks stay comparisons of columns, as loads and stores of several numbers at once need.
    """
    inputs, gradients, marks = (), (), ()
    for index in tl.static_range(GROUP):
        at = position + index
        places = (at - first) * channels + columns
        lanes = columns < tl.where((at >= 0) & (at < end), channels, 0)
        found = tl.load(x + places, mask=lanes, other=0.0)
        if HAS_START:
            found = found.to(tl.float32) + load_carried(start, at, columns, channels, TAPS)
        inputs = inputs + (found,)
        gradients = gradients + (tl.load(dy + places, mask=lanes, other=0.0),)
        if HAS_CODES:
            marks = marks + (load_codes(codes, at, tokens),)
    return inputs, gradients, marks


@triton.jit
def read_token(
    inputs, marks, dy, waiting, sums, bias_sum, factors, offset,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CODES: tl.constexpr, SILU: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """The share of one reader in dx of the W inputs that it sees, in dw and in dbias.

    Args:
        inputs: W rows [C] up to the reader's own, float32.
        marks: their codes, where there are documents.
        dy: [C] of the reader.
        waiting: W - 1 rows of dx, of the inputs before the reader's own.
        sums: W rows of dw.
        bias_sum: [C].
        factors: W rows of weights.
        offset: the bias [C].

    Returns:
        W rows of dx, of which the first is complete; `sums` and `bias_sum` with this reader's share.
    """
    da = dy.to(tl.float32)
    own = tl.zeros_like(da)
    if RESIDUAL:
        own = da
        if HAS_CODES:
            own = tl.where(marks[TAPS - 1] >= 0, da, 0.0)
    shares = waiting + (own,)
    seen, sees, made, counted = inputs, (), (), ()
    if HAS_CODES:
        seen = ()
        number = document(marks[TAPS - 1])
        for tap in tl.static_range(TAPS):
            # a code is its own document's number unless it is negative: equality also leaves out padding
            sees = sees + (marks[tap] == number,)
            seen = seen + (tl.where(sees[tap], inputs[tap], 0.0),)
    if SILU:
        a = offset
        for tap in tl.static_range(TAPS):
            a += seen[tap] * factors[tap]
        # sigmoid with 1 / b as rsqrt(b b), which takes two instructions where a division takes five
        below = 1.0 + tl.exp2(a * -1.4426950408889634)
        gate = tl.rsqrt(below * below)
        da = da * gate * (1.0 + a * (1.0 - gate))
    for tap in tl.static_range(TAPS):
        share = da
        if HAS_CODES:
            share = tl.where(sees[tap], da, 0.0)
        made = made + (shares[tap] + share * factors[tap],)
        counted = counted + (sums[tap] + seen[tap] * da,)
    if HAS_BIAS:
        bias_sum += da
    return made, counted, bias_sum


@triton.jit
def store_gradient(
    dx, dstart, dfinal, codes, gradient, code, first, position, behind, columns, tokens, channels,
    TAPS: tl.constexpr, HAS_CODES: tl.constexpr, HAS_FINAL: tl.constexpr, START_GRADIENT: tl.constexpr,
):  # fmt: skip
    """dx [C] of an input from `first` to `behind`, or of a carried one; the new state's gradient comes on top."""
    mine = tl.where((position >= first) & (position < behind), channels, 0)
    if HAS_FINAL:
        kept = position - (tokens + 1 - TAPS)
        width = tl.where((kept >= 0) & (kept < TAPS - 1), mine, 0)
        if HAS_CODES:
            width = tl.where(code == document(tl.load(codes + tokens - 1)), width, 0)
        gradient += tl.load(dfinal + kept * channels + columns, mask=columns < width, other=0.0).to(
            tl.float32
        )
    if START_GRADIENT:
        carried = columns < tl.where(position < 0, mine, 0)
        places = (position + (TAPS - 1)) * channels + columns
        tl.store(dstart + places, gradient.to(dstart.dtype.element_ty), mask=carried)
    lanes = columns < tl.where(position >= 0, mine, 0)
    tl.store(dx + (position - first) * channels + columns, gradient.to(dx.dtype.element_ty), mask=lanes)


@triton.jit
def backward_span(
    x, weight, bias, start, dy, dfinal, dx, dstart, partial, codes, row, block, tokens, channels, span, total,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_START: tl.constexpr, HAS_CODES: tl.constexpr,
    SILU: tl.constexpr, RESIDUAL: tl.constexpr, HAS_FINAL: tl.constexpr, START_GRADIENT: tl.constexpr,
    GROUP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """`span` tokens of a block of one stream's channels; row r < W of `partial` is dw of tap r, row W is dbias."""
    batch = tl.program_id(2).to(tl.int64)
    columns = block * BC + tl.arange(0, BC)
    lanes = columns < channels
    first = row * span
    if HAS_START:  # the carried inputs are inputs too: they have gradients of their own
        first -= TAPS - 1
        start += batch * (TAPS - 1) * channels
    if START_GRADIENT:
        dstart += batch * (TAPS - 1) * channels
    if HAS_FINAL:
        dfinal += batch * (TAPS - 1) * channels
    if HAS_CODES:
        codes += batch * tokens
    skipped = (batch * tokens + first) * channels
    x += skipped
    dy += skipped
    dx += skipped
    partial += (batch * tl.num_programs(1) + row) * (TAPS + HAS_BIAS) * total
    behind = tl.minimum(tokens, first + span)
    end = tl.minimum(tokens, first + span + (TAPS - 1))
    offset, bias_sum = tl.zeros([BC], dtype=tl.float32), tl.zeros([BC], dtype=tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias + columns, mask=lanes, other=0.0).to(tl.float32)
    factors, sums, waiting, past, old = (), (), (), (), ()
    for tap in tl.static_range(TAPS):
        factor = tl.load(weight + columns * TAPS + tap, mask=lanes, other=0.0).to(tl.float32)
        factors = factors + (factor,)
        sums = sums + (tl.zeros([BC], dtype=tl.float32),)
    for tap in tl.static_range(TAPS - 1):
        at = first + (tap + 1 - TAPS)
        there = columns < tl.where(at >= 0, channels, 0)
        before = tl.load(x + (at - first) * channels + columns, mask=there, other=0.0).to(tl.float32)
        if HAS_START:
            before += load_carried(start, at, columns, channels, TAPS)
        past = past + (before,)
        waiting = waiting + (tl.zeros([BC], dtype=tl.float32),)
        if HAS_CODES:
            old = old + (load_codes(codes, at, tokens),)
    inputs, gradients, marks = load_group(
        x, start, dy, codes, first, first, end, columns, tokens, channels, TAPS, HAS_START, HAS_CODES, GROUP
    )
    own = tl.cdiv(behind - first, GROUP)
    for group in range(0, own + (TAPS - 1 + GROUP - 1) // GROUP):  # the last ones are readers behind the span
        position = first + group * GROUP
        later = load_group(
            x, start, dy, codes, first, position + GROUP, end, columns, tokens, channels,
            TAPS, HAS_START, HAS_CODES, GROUP,
        )  # fmt: skip
        known, known_marks = past, old + marks
        for index in tl.static_range(GROUP):
            known = known + (inputs[index].to(tl.float32),)
        for index in tl.static_range(GROUP):
            made, sums, bias_sum = read_token(
                known[index : index + TAPS], known_marks[index : index + TAPS], gradients[index], waiting, sums,
                bias_sum, factors, offset, TAPS, HAS_BIAS, HAS_CODES, SILU, RESIDUAL,
            )  # fmt: skip
            code = position
            if HAS_CODES:
                code = known_marks[index]
            store_gradient(
                dx, dstart, dfinal, codes, made[0], code, first, position + (index + 1 - TAPS), behind, columns,
                tokens, channels, TAPS, HAS_CODES, HAS_FINAL, START_GRADIENT,
            )  # fmt: skip
            waiting = made[1:]
        past, old = known[GROUP:], known_marks[GROUP:]
        inputs, gradients, marks = later
        if group == own - 1:  # sums go on, but what follows is the next program's
            for tap in tl.static_range(TAPS):
                tl.store(partial + tap * total + columns, sums[tap], mask=lanes)
            if HAS_BIAS:
                tl.store(partial + TAPS * total + columns, bias_sum, mask=lanes)


@triton.jit
def backward_kernel(
    x0, weight0, bias0, start0, dy0, dfinal0, dx0, dstart0, partial0, channels0, blocks0,
    x1, weight1, bias1, start1, dy1, dfinal1, dx1, dstart1, partial1, channels1, blocks1,
    x2, weight2, bias2, start2, dy2, dfinal2, dx2, dstart2, partial2, channels2,
    codes, tokens, span, total,
    STREAMS: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_START: tl.constexpr,
    HAS_CODES: tl.constexpr, SILU: tl.constexpr, RESIDUAL: tl.constexpr, HAS_FINAL: tl.constexpr,
    START_GRADIENT: tl.constexpr, GROUP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid (channel blocks of all streams, spans, batch); see `forward_kernel` for the branches.

    `span` is a multiple of `GROUP`; rows of the partial sums are `total` numbers apart, the channels of all streams.
    """
    block, row = tl.program_id(0), tl.program_id(1)
    if STREAMS == 1:
        backward_span(x0, weight0, bias0, start0, dy0, dfinal0, dx0, dstart0, partial0, codes, row, block, tokens,
                      channels0, span, total, TAPS, HAS_BIAS, HAS_START, HAS_CODES, SILU, RESIDUAL, HAS_FINAL,
                      START_GRADIENT, GROUP, BC)  # fmt: skip
    else:
        if block < blocks0:
            backward_span(x0, weight0, bias0, start0, dy0, dfinal0, dx0, dstart0, partial0, codes, row, block,
                          tokens, channels0, span, total, TAPS, HAS_BIAS, HAS_START, HAS_CODES, SILU, RESIDUAL,
                          HAS_FINAL, START_GRADIENT, GROUP, BC)  # fmt: skip
        else:
            if STREAMS == 2:
                backward_span(x1, weight1, bias1, start1, dy1, dfinal1, dx1, dstart1, partial1, codes, row,
                              block - blocks0, tokens, channels1, span, total, TAPS, HAS_BIAS, HAS_START, HAS_CODES,
                              SILU, RESIDUAL, HAS_FINAL, START_GRADIENT, GROUP, BC)  # fmt: skip
            else:
                if block < blocks0 + blocks1:
                    backward_span(x1, weight1, bias1, start1, dy1, dfinal1, dx1, dstart1, partial1, codes, row,
                                  block - blocks0, tokens, channels1, span, total, TAPS, HAS_BIAS, HAS_START,
                                  HAS_CODES, SILU, RESIDUAL, HAS_FINAL, START_GRADIENT, GROUP, BC)  # fmt: skip
                else:
                    backward_span(x2, weight2, bias2, start2, dy2, dfinal2, dx2, dstart2, partial2, codes, row,
                                  block - blocks0 - blocks1, tokens, channels2, span, total, TAPS, HAS_BIAS,
                                  HAS_START, HAS_CODES, SILU, RESIDUAL, HAS_FINAL, START_GRADIENT, GROUP,
                                  BC)  # fmt: skip
