"""One token of short_conv: up to three streams in one launch, their last inputs moved up by one in place."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def step_channels(
    x, weight, bias, state, y, valid, stride, block, channels,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_VALID: tl.constexpr, SILU: tl.constexpr, RESIDUAL: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """A block of channels of one row. Each row of the state is read before the one that replaces it is written."""
    batch = tl.program_id(1).to(tl.int64)
    columns = block * BC + tl.arange(0, BC)
    lanes = columns < channels
    state += batch * (TAPS - 1) * channels
    own = tl.load(x + batch * stride + columns, mask=lanes, other=0.0).to(tl.float32)
    moves = lanes
    if HAS_VALID:
        here = tl.load(valid + batch).to(tl.int32)
        own = tl.where(here != 0, own, 0.0)
        moves = columns < channels * here
    total = own * tl.load(weight + columns * TAPS + (TAPS - 1), mask=lanes, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=lanes, other=0.0).to(tl.float32)
    for tap in tl.static_range(TAPS - 1):
        value = tl.load(state + tap * channels + columns, mask=lanes, other=0.0)
        total += value.to(tl.float32) * tl.load(weight + columns * TAPS + tap, mask=lanes, other=0.0).to(
            tl.float32
        )
        if tap > 0:
            tl.store(state + (tap - 1) * channels + columns, value, mask=moves)
    if TAPS > 1:
        tl.store(state + (TAPS - 2) * channels + columns, own.to(state.dtype.element_ty), mask=moves)
    if SILU:
        total = total * tl.sigmoid(total)
    if RESIDUAL:
        total += own
    tl.store(y + batch * channels + columns, total.to(y.dtype.element_ty), mask=lanes)


@triton.jit
def step_kernel(
    x0, weight0, bias0, state0, y0, stride0, channels0, blocks0,
    x1, weight1, bias1, state1, y1, stride1, channels1, blocks1,
    x2, weight2, bias2, state2, y2, stride2, channels2,
    valid,
    STREAMS: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_VALID: tl.constexpr,
    SILU: tl.constexpr, RESIDUAL: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid (channel blocks of all streams, batch); see `forward_kernel` for the branches."""
    block = tl.program_id(0)
    if STREAMS == 1:
        step_channels(x0, weight0, bias0, state0, y0, valid, stride0, block, channels0,
                      TAPS, HAS_BIAS, HAS_VALID, SILU, RESIDUAL, BC)  # fmt: skip
    else:
        if block < blocks0:
            step_channels(x0, weight0, bias0, state0, y0, valid, stride0, block, channels0,
                          TAPS, HAS_BIAS, HAS_VALID, SILU, RESIDUAL, BC)  # fmt: skip
        else:
            if STREAMS == 2:
                step_channels(x1, weight1, bias1, state1, y1, valid, stride1, block - blocks0, channels1,
                              TAPS, HAS_BIAS, HAS_VALID, SILU, RESIDUAL, BC)  # fmt: skip
            else:
                if block < blocks0 + blocks1:
                    step_channels(x1, weight1, bias1, state1, y1, valid, stride1, block - blocks0, channels1,
                                  TAPS, HAS_BIAS, HAS_VALID, SILU, RESIDUAL, BC)  # fmt: skip
                else:
                    step_channels(x2, weight2, bias2, state2, y2, valid, stride2, block - blocks0 - blocks1,
                                  channels2, TAPS, HAS_BIAS, HAS_VALID, SILU, RESIDUAL, BC)  # fmt: skip
