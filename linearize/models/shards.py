"""A safetensors file judged by its header: names, dtypes, shapes and places of its tensors, in milliseconds."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.errors import CheckpointError

MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format itself."""

BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""dtype -> bits of a number."""
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""What weights are stored in, by torch's name; smaller numbers are codes that need scales."""


@dataclass(frozen=True)
class Stored:
    """A tensor as a header describes it."""

    dtype: str
    shape: tuple[int, ...]


def check_shard(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file whose header describes the file's bytes without overlap or gap.

    Raises:
        CheckpointError: the file is cut short, or its header is damaged; names the tensor where one is wrong.
    """
    try:
        size, length, header = _read(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror or error})") from error
    try:
        content = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(_damaged(file, "its safetensors header cannot be read")) from error
    if not isinstance(content, dict):
        raise CheckpointError(_damaged(file, "its safetensors header cannot be read"))
    content.pop("__metadata__", None)
    places = sorted((*_place(file, name, entry), name) for name, entry in content.items())
    end = 0
    for first, last, name in places:
        if first != end:
            raise CheckpointError(
                _damaged(file, f"tensor {name} begins at byte {first:,} and not at {end:,}")
            )
        end = last
    if size != 8 + length + end:
        raise CheckpointError(_cut(file, size, f"its header asks for {8 + length + end:,}"))
    return {name: Stored(entry["dtype"], tuple(entry["shape"])) for name, entry in content.items()}


def _read(file: Path) -> tuple[int, int, bytes]:
    """Size of the file and of its header in bytes, and the header."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length and length <= MAX_HEADER and size < 8 + length:
            raise CheckpointError(_cut(file, size, f"its header alone takes {8 + length:,}"))
        return size, length, stream.read(length) if 0 < length <= MAX_HEADER else b""


def _place(file: Path, name: str, entry: Any) -> tuple[int, int]:
    """First and last byte of a tensor whose entry makes sense by itself."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, place = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(
            _damaged(file, f"tensor {name} is of dtype {dtype!r}, which safetensors does not have")
        )
    if not _counts(shape):
        raise CheckpointError(_damaged(file, f"tensor {name} has the shape {shape!r}"))
    if not _counts(place) or len(place) != 2 or place[0] > place[1]:
        raise CheckpointError(_damaged(file, f"tensor {name} lies at {place!r}"))
    needs, has = math.prod(shape) * BITS[dtype], 8 * (place[1] - place[0])
    if needs != has:
        raise CheckpointError(
            _damaged(file, f"tensor {name} of shape {shape} takes {needs // 8:,} bytes, and has {has // 8:,}")
        )
    return place[0], place[1]


def _counts(value: Any) -> bool:
    whole = isinstance(value, list) and all(type(number) is int for number in value)
    return whole and all(0 <= number < 2**63 for number in value)


def _cut(file: Path, size: int, rule: str) -> str:
    return f"{file} is corrupt or truncated: it has {size:,} bytes, {rule}; fetch it again"


def _damaged(file: Path, why: str) -> str:
    return f"{file} is corrupt or truncated: {why}; fetch it again"
