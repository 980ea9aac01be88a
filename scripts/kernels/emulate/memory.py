"""Bytes of the device and of a block, with what is needed to see places out of bounds and races.

Between two barriers a byte that one warp has written belongs to it: others neither read nor write it, unless they write
what is there already, as threads do that hold the same number. Bytes of the device belong to the block that wrote them,
as far as its launch goes. Threads of one warp are taken to run together.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from emulate.formats import Array

Report = Callable[[str], None]
WARP = 32


class GlobalMemory:
    """The device's memory.

    Args:
        contents: uint8.
        valid: whether each byte belongs to a tensor.
    """

    def __init__(self, contents: Array, valid: Array) -> None:
        self.contents, self.valid = contents, valid
        self.owner = np.zeros(contents.size, np.int32)
        """Block that wrote a byte, from 1 on."""
        self.writer = np.full(contents.size, -1, np.int32)
        self.written_at = np.full(contents.size, -1, np.int32)
        """Warp that wrote a byte last, and how many barriers its block was behind by then."""
        self.block, self.barriers = 0, 0

    def begin(self, block: int) -> None:
        """Another block runs."""
        self.block, self.barriers = block, 0

    def places(
        self, addresses: Array, size: int, mask: Array, what: str, report: Report
    ) -> tuple[Array, Array]:
        """Numbers of the bytes [n, size], and the threads [n] that ask for them; those out of bounds are left out."""
        threads = np.flatnonzero(mask)
        places = addresses[threads, None] + np.arange(size)
        inside = (places >= 0) & (places < self.valid.size)
        good = (inside & self.valid[np.where(inside, places, 0)]).all(1)
        if not good.all():
            report(f"global memory: {what} out of bounds")
        return places[good], threads[good]

    def read(self, addresses: Array, size: int, mask: Array, report: Report) -> Array:
        """Bytes [T, size], with all bits set for threads outside the mask or out of bounds."""
        found = np.full((mask.size, size), 0xFF, np.uint8)
        places, threads = self.places(addresses, size, mask, "read", report)
        found[threads] = self.contents[places]
        owner = self.owner[places]
        if ((owner != 0) & (owner != self.block)).any():
            report("global memory: read of what another block wrote")
        fresh = (owner == self.block) & (self.written_at[places] == self.barriers)
        if (fresh & (self.writer[places] != threads[:, None] // WARP)).any():
            report("global memory: read of what another warp wrote since the barrier")
        return found

    def write(self, addresses: Array, values: Array, mask: Array, report: Report) -> None:
        """Bytes [T, size] of the threads in the mask."""
        places, threads = self.places(addresses, values.shape[1], mask, "write", report)
        owner = self.owner[places]
        if ((owner != 0) & (owner != self.block)).any():
            report("global memory: written by two blocks")
        self.contents[places] = values[threads]
        if (self.contents[places] != values[threads]).any():
            report("global memory: threads write different numbers to one place")
        self.owner[places], self.written_at[places] = self.block, self.barriers
        self.writer[places] = threads[:, None] // WARP


class SharedMemory:
    """One block's shared memory.

    Args:
        size: bytes.
        threads: of a block.
    """

    def __init__(self, size: int, threads: int) -> None:
        self.size, self.warps = size, threads // WARP
        self.clear()

    def clear(self) -> None:
        """Nothing is written, and all bits are set: NaN, and places far out of bounds."""
        self.contents = np.full(self.size, 0xFF, np.uint8)
        self.written_at = np.full(self.size, -1, np.int32)
        self.writer = np.full(self.size, -1, np.int32)
        self.read_at = np.full((self.warps, self.size), -1, np.int32)
        """Barriers that each warp was behind when it read a byte last."""
        self.barriers = 0

    def places(
        self, addresses: Array, size: int, mask: Array, what: str, report: Report
    ) -> tuple[Array, Array]:
        """As `GlobalMemory.places`."""
        threads = np.flatnonzero(mask)
        first = addresses[threads]
        good = (first >= 0) & (first + size <= self.size)
        if not good.all():
            report(f"shared memory: {what} out of bounds ({self.size} bytes)")
        return first[good, None] + np.arange(size), threads[good]

    def read(self, addresses: Array, size: int, mask: Array, report: Report) -> Array:
        """As `GlobalMemory.read`."""
        found = np.full((mask.size, size), 0xFF, np.uint8)
        places, threads = self.places(addresses, size, mask, "read", report)
        found[threads] = self.contents[places]
        warps = threads[:, None] // WARP
        if (self.written_at[places] < 0).any():
            report("shared memory: read of what nothing was written to")
        if ((self.written_at[places] == self.barriers) & (self.writer[places] != warps)).any():
            report("shared memory: read of what another warp wrote since the barrier")
        self.read_at[warps, places] = self.barriers
        return found

    def write(self, addresses: Array, values: Array, mask: Array, report: Report) -> None:
        """As `GlobalMemory.write`."""
        places, threads = self.places(addresses, values.shape[1], mask, "write", report)
        warps, changed = threads[:, None] // WARP, self.contents[places] != values[threads]
        if (changed & (self.written_at[places] == self.barriers) & (self.writer[places] != warps)).any():
            report("shared memory: written over what another warp wrote since the barrier")
        for warp in range(self.warps):
            others = changed & (warps != warp)
            if others.any() and (others & (self.read_at[warp][places] == self.barriers)).any():
                report("shared memory: written over what another warp read since the barrier")
        self.contents[places] = values[threads]
        if (self.contents[places] != values[threads]).any():
            report("shared memory: threads write different numbers to one place")
        self.written_at[places] = self.barriers
        self.writer[places] = warps
