"""How much memory is free, and whether what shall be made fits into it.

A CPU's allocator hands out more than there is, and the machine stops when it is written to: so what is made of a size
that somebody gave is added up and held against what is free before it is made. A GPU's refuses by itself, but without
saying how much would have fitted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from linearize.console import size
from linearize.errors import LinearizeError

MEMINFO = Path("/proc/meminfo")
OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


class Room:
    """Memory that is free now, of which parts are taken one after the other.

    Args:
        device: that it is the memory of.
        what: is made there, for the message ("the states and keys of 8 texts").
        remedy: what to do where it does not fit, in words that follow a semicolon.

    Attributes:
        free: bytes, None where the system does not tell.
        taken: bytes so far.
    """

    def __init__(self, device: torch.device, what: str, remedy: str) -> None:
        self.free, self.taken = free(device), 0
        self._what, self._remedy = what, remedy

    def take(self, count: int) -> None:
        """Set so many bytes aside.

        Raises:
            LinearizeError: they are more than what is left.
        """
        self.taken += count
        if self.free is not None and self.taken > self.free:
            raise LinearizeError(
                f"{self._what} need more memory than there is: {size(self.taken)} or more, where {size(self.free)} are "
                f"free; {self._remedy}"
            )


def free(device: torch.device) -> int | None:
    """Bytes that can be had on a device, None where the system does not tell."""
    if device.type == "cuda":
        own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + own
    return (machine()[0] or None) if device.type == "cpu" else None


def machine() -> tuple[int, int]:
    """Bytes of memory that are free and that there are in all, for this process; zeros where the system does not tell.

    In a container it is what the container has left, where that is less than the machine has.
    """
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return 0, 0
    sizes = dict(line.split(":", 1) for line in lines if ":" in line)
    left, total = (int(sizes.get(key, "0").split()[0]) * 1024 for key in ("MemAvailable", "MemTotal"))
    for limit, used in _groups():
        left, total = min(left, max(limit - used, 0)), min(total, limit)
    return left, total


def _groups() -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of every control group that this process is in and that has a limit."""
    try:
        lines = OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, kinds, path = (*line.split(":", 2), "", "")[:3]
        if kinds == "":
            mounts, names = [GROUPS, GROUPS / "unified"], ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            mounts = [GROUPS / "memory"]
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        for mount in mounts:
            inner = mount / path.lstrip("/")
            # a container may see the names that groups have outside of it, and its own at the root
            for folder in (inner, *(above for above in inner.parents if above.is_relative_to(mount))):
                found = _group(folder, *names)
                if found is not None:
                    yield found


def _group(folder: Path, limit: str, used: str, cached: str) -> tuple[int, int] | None:
    """Limit of a group and what is used of it, files that the system would give up left out."""
    try:
        most, now = ((folder / name).read_text(encoding="ascii").strip() for name in (limit, used))
        stat = dict(
            line.split(" ", 1) for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        )
        return int(most), max(int(now) - int(stat.get(cached, 0)), 0)  # "max" is none, and no number
    except (OSError, ValueError):
        return None
