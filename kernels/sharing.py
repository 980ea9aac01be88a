"""How many programs share the keys of one key head, when one token looks back on many."""

from __future__ import annotations

from torch import Tensor

from linearize.kernels.launch import processors

WAVES, MOST = 4, 64
"""Programs to a multiprocessor that there should be, and programs to a key head at most."""
TILE, STAGES = 16_384, 3
"""Bytes of the keys, and of the values, in a tile, and tiles in flight with the one that is worked on."""


def tile_of(widest: int, itemsize: int) -> int:
    """Keys in a tile: as many bytes whatever the width."""
    return max(16, min(128, TILE // (widest * itemsize)))


def parts_of(like: Tensor, heads: int, slots: int, tile: int) -> int:
    """Programs that share one of so many key heads of all rows: enough for the device, each with two tiles or more.

    Args:
        like: a tensor on the device.
        heads: key heads of all rows.
        slots: keys that a head has room for.
        tile: keys that a program reads at a time.
    """
    return max(1, min(MOST, WAVES * processors(like.device) // heads, slots // (2 * tile)))
