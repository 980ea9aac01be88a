"""Who may read what is written: whom the umask says, also where a library writes for the owner alone.

safetensors writes by way of a temporary file, whose mode (0600) stays, and `mkdtemp` makes folders of 0700.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def open_up(path: Path) -> None:
    """Give a file, or a folder and all that it holds, the mode that `open` and `mkdir` would have given."""
    hidden = umask()
    for each in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if not each.is_symlink():
            with suppress(OSError):  # a disk without modes
                each.chmod((0o777 if each.is_dir() else 0o666) & ~hidden)


def umask() -> int:
    """The process' umask; the system's call to read it sets it, for every thread, so it is asked elsewhere first."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    found = os.umask(0o077)
    os.umask(found)
    return found
