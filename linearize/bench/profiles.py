"""The longest kernels of a call, and how much of its time the device is busy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from linearize.bench import quiet, whole
from linearize.bench.whole import Row, Stopwatch

LONGEST = 12
"""Kernels of a profile."""
FILE = "recipes-profile.json"


def profiled(call: Callable[[], Any], watch: Stopwatch, milliseconds: float) -> Row:
    """The longest kernels of one call, and the part of an unobserved call's time in which the device is busy.

    Args:
        call: has run before.
        watch: of the device; the processes beside it stand still meanwhile.
        milliseconds: that it takes unobserved.
    """
    from torch.profiler import ProfilerActivity, profile

    on_gpu = watch.device.type == "cuda"
    watch.wait()
    kinds = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    # the others go on before what was recorded is read
    with profile(activities=kinds) as recorded, quiet.others(watch.beside):
        call()
        watch.wait()
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kernels = sorted(recorded.key_averages(), key=lambda event: -getattr(event, name))
    kernels = [event for event in kernels if getattr(event, name) > 0]
    spent = sum(getattr(event, name) for event in kernels) / 1e3
    return {
        "milliseconds": milliseconds,
        "busy_milliseconds": round(spent, 3),
        "busy": round(min(1.0, spent / milliseconds), 4),
        "kernels": sum(event.count for event in kernels),
        "longest": [
            {
                "name": event.key[:120],
                "count": event.count,
                "milliseconds": round(getattr(event, name) / 1e3, 3),
            }
            for event in kernels[:LONGEST]
        ],
    }


def kept(folder: Path, row: Row) -> None:
    """Write a profile beside those that are there; processes may share the folder."""
    from filelock import FileLock

    path = folder / FILE
    with FileLock(path.with_suffix(".lock")):
        whole.write(path, whole.merged(whole.read(path), row))
