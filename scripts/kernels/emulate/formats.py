"""Numbers as PTX names them, held as bits: float32 and its like viewed by numpy, bfloat16 by way of float32."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
TYPES: dict[str, Any] = {
    "pred": np.bool_,
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "bf16": np.dtype("u2"),
}
"""PTX type -> numpy's; bfloat16, which numpy has not, as bits."""
PAIRS = {"f16x2": "f16", "bf16x2": "bf16"}
"""Two numbers in a 32-bit register, the first in the low half."""
SMALLEST_NORMAL = np.float32(2.0**-126)


def is_float(kind: str) -> bool:
    """Whether a PTX type holds floating-point numbers."""
    return kind in ("f16", "f32", "f64", "bf16")


def unsigned(dtype: Any) -> Any:
    """numpy's unsigned type as wide as another."""
    return np.dtype(f"u{np.dtype(dtype).itemsize}")


def flush(x: Array) -> Array:
    """Float32 with subnormal numbers as zeros of their sign, as `.ftz` has them."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def widen(bits: Array, kind: str) -> Array:
    """16-bit numbers as float32.

    Args:
        bits: any shape, uint16.
        kind: "f16" or "bf16".
    """
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(x: Array, kind: str) -> Array:
    """Float32 as the bits (uint16) of the nearest "f16" or "bf16", halves to even."""
    x = np.ascontiguousarray(x, np.float32)
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def to_tf32(x: Array) -> Array:
    """The bits (uint32) of float32 numbers rounded to tf32's 10 bits, halves away from zero."""
    return (x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)


def to_integer(x: Array, kind: str) -> Array:
    """Whole floats as integers of a PTX type: NaN is 0, and what is too large the largest."""
    limits = np.iinfo(TYPES[kind])
    wide = x.astype(np.float64)
    # the largest 64-bit number is no float64: as one it would be a number too many
    inside = (wide > limits.min) & (wide < limits.max)
    found = np.where(inside, wide, 0).astype(TYPES[kind])
    return np.select([wide >= limits.max, wide <= limits.min], [limits.max, limits.min], found).astype(
        found.dtype
    )
