"""Shared memory that window_linear's kernels take, so that no call is launched that a device has no room for.

Triton alone decides how much a kernel takes: tiles of all operands, once or more, by dtype and by version. The table is
what Triton 3.6 gives for sm_90 (`scripts/kernels/aot.py` prints it; 3.9 gave no more in 73 kernels), for windows of 4
chunks, which take the most, with documents, sinks, factors and segments; in KiB, rounded up after half of one has been
added for variants with less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from linearize.kernels.launch import shared_memory

MAPS = (16, 32, 64, 128)
"""Columns of the maps, in the order of the table's rows."""


@dataclass(frozen=True)
class Need:
    """Bytes that the largest kernel of a call takes in one program.

    Attributes:
        aligned: of the kernels for windows of whole chunks.
        general: of those for every window.
    """

    aligned: int
    general: int


def need(dtype: torch.dtype, key_dim: int, value_dim: int, map_dim: int, *, trains: bool) -> Need | None:
    """What a call takes, or None for head dims that nothing is known of.

    Args:
        dtype: of q, k and v.
        key_dim, value_dim: powers of two, as the kernels see them.
        map_dim: columns of the maps.
        trains: whether backward will run too.
    """
    rows = KIBIBYTES.get(dtype, {}).get((key_dim, value_dim))
    if rows is None or map_dim not in MAPS:
        return None
    aligned, aligned_back, general, general_back = rows[MAPS.index(map_dim)]
    if trains:
        aligned, general = max(aligned, aligned_back), max(general, general_back)
    return Need(1024 * aligned, 1024 * general)


def rule(
    device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int, map_dim: int, *, trains: bool
) -> tuple[bool, str]:
    """For `dispatch.require`: whether one of the two kinds of kernels fits, and what to say where none does."""
    limit = shared_memory(device)
    found = need(dtype, key_dim, value_dim, map_dim, trains=trains)
    sizes = f"head dims {key_dim} and {value_dim}, maps of {map_dim}, {dtype}{', with gradients' if trains else ''}"
    if found is None:
        return False, f"{sizes}: nobody has measured whether they fit into {limit:,} bytes"
    smallest = min(found.aligned, found.general)
    return smallest <= limit, f"{sizes} take {smallest:,} bytes, and a block here may have {limit:,}"


def aligned_fits(
    device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int, map_dim: int, *, trains: bool
) -> bool:
    """Whether the kernels for windows of whole chunks have room; where not, the general ones take those windows too."""
    found = need(dtype, key_dim, value_dim, map_dim, trains=trains)
    return found is None or found.aligned <= shared_memory(device)


KIBIBYTES: dict[torch.dtype, dict[tuple[int, int], list[tuple[int, int, int, int]]]] = {
    torch.bfloat16: {
        (16, 16): [(13, 13, 10, 15), (13, 15, 11, 18), (16, 21, 15, 24), (28, 30, 25, 47)],
        (32, 32): [(25, 21, 19, 26), (25, 24, 20, 30), (25, 32, 22, 38), (38, 39, 33, 62)],
        (64, 64): [(49, 37, 36, 50), (49, 39, 38, 54),
            (90, 84, 90, 106), (130, 138, 114, 130)],
        (64, 128): [(33, 45, 41, 41), (33, 55, 45, 41),
            (74, 126, 74, 85), (130, 214, 98, 125)],
        (128, 64): [(49, 67, 46, 41), (50, 69, 50, 41),
            (106, 118, 106, 97), (178, 190, 138, 149)],
        (128, 128): [(49, 75, 57, 57), (50, 78, 57, 57),
            (106, 158, 106, 117), (178, 262, 138, 181)],
        (128, 256): [(33, 92, 33, 81), (33, 110, 33, 81),
            (110, 238, 81, 165), (182, 406, 113, 245)],
        (256, 128): [(49, 123, 65, 89), (57, 125, 65, 89),
            (174, 222, 129, 193), (278, 358, 177, 293)],
        (256, 256): [(49, 139, 65, 105), (57, 142, 65, 105),
            (174, 302, 129, 229), (278, 502, 177, 357)],
    },
    torch.float16: {
        (16, 16): [(9, 13, 5, 7), (12, 17, 6, 9), (20, 43, 11, 15), (36, 77, 21, 91)],
        (32, 32): [(13, 21, 9, 13), (18, 28, 11, 13), (30, 45, 13, 21), (55, 81, 25, 101)],
        (64, 64): [(25, 37, 17, 25), (30, 47, 17, 25),
            (106, 121, 41, 73), (194, 202, 65, 129)],
        (64, 128): [(25, 52, 33, 41), (29, 71, 37, 41),
            (106, 186, 65, 137), (194, 339, 129, 201)],
        (128, 64): [(33, 67, 33, 41), (38, 70, 33, 41),
            (138, 153, 57, 105), (242, 251, 89, 185)],
        (128, 128): [(33, 76, 41, 57), (37, 94, 41, 57),
            (138, 233, 65, 145), (242, 386, 129, 257)],
        (128, 256): [(33, 108, 33, 81), (37, 142, 33, 81),
            (138, 362, 57, 273), (242, 658, 89, 401)],
        (256, 128): [(49, 123, 65, 89), (53, 126, 65, 89),
            (202, 282, 89, 209), (338, 482, 137, 369)],
        (256, 256): [(49, 140, 65, 105), (53, 174, 65, 105),
            (202, 426, 89, 289), (338, 754, 137, 513)],
    },
    torch.float32: {
        (16, 16): [(11, 12, 11, 9), (21, 22, 17, 17), (42, 49, 33, 33), (82, 81, 65, 97)],
        (32, 32): [(13, 17, 13, 9), (25, 26, 25, 17), (50, 50, 33, 33), (98, 81, 65, 97)],
        (64, 64): [(25, 33, 25, 17), (33, 34, 33, 17),
            (130, 225, 97, 97), (226, 289, 193, 193)],
        (64, 128): [(25, 41, 41, 129), (33, 50, 49, 129),
            (130, 305, 97, 161), (226, 386, 193, 257)],
        (128, 64): [(49, 65, 49, 129), (65, 65, 65, 129),
            (194, 321, 129, 193), (322, 417, 257, 321)],
        (128, 128): [(49, 65, 49, 161), (65, 66, 65, 161),
            (194, 401, 129, 193), (322, 515, 257, 385)],
        (128, 256): [(49, 69, 49, 257), (65, 98, 65, 257),
            (194, 561, 129, 321), (322, 770, 257, 513)],
        (256, 128): [(97, 129, 97, 257), (129, 129, 129, 257),
            (322, 593, 193, 385), (514, 771, 385, 673)],
        (256, 256): [(97, 129, 97, 321), (129, 129, 129, 321),
            (322, 753, 193, 385), (514, 1026, 385, 769)],
    },
}  # fmt: skip
"""dtype -> (key_dim, value_dim) -> for each of `MAPS`: aligned forward and backward, general forward and backward."""
