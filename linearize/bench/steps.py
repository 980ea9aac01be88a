"""Looking at a trainer's steps from outside: when they end, what they hold, what one of them launches."""

from __future__ import annotations

import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from transformers import TrainerCallback

from linearize.bench import quiet

WARM = 4
"""Steps that are not timed: kernels compile, graphs are captured, the optimizer gets its moments."""
LEAST = 3
"""Steps that are timed at least."""
BUSY = 0.85
"""Share of a step below which the device waits for launches rather than for its own work."""
SHOWN = 12
"""Kernels that a profile lists, those that take longest first."""
WAITING = 50e-6
"""Seconds of a gap between two kernels from which on it is the host's: those of a graph follow each other at once."""
PRODUCTS = ("gemm", "nvjet", "cutlass", "xmma", "cublas", "aten::mm", "aten::addmm", "aten::bmm")
"""What kernels of matrix products have in their names."""


class Clocked(TrainerCallback):
    """Times a trainer's optimizer steps from end to end, and stops it when it has seen enough.

    Args:
        device: where the steps run; with CUDA, its events are the clock.
        spend: seconds of timed steps.
        profile: whether one further step is looked into.
        warm: steps that are not timed.
        beside: a folder of processes that stand still meanwhile, see `quiet.alone`.

    Attributes:
        first: seconds until the first step was done.
        seconds: median of the timed steps.
        count: how many were timed.
        peak_gib: most that was held since the first step, None where nobody counts.
        profiled: `busy`, `kernels`, `products` and `bound`, where asked for.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        spend: float,
        profile: bool,
        warm: int = WARM,
        beside: Path | None = None,
    ) -> None:
        self.device, self.spend, self.profile, self.warm = device, spend, profile, warm
        self.first = self.seconds = 0.0
        self.count = 0
        self.peak_gib: float | None = None
        self.profiled: dict[str, Any] = {}
        self._marks: list[Any] = []
        self._began = self._timed_from = 0.0
        self._recorder: Any = None
        self._beside, self._turn = beside, ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.count and self.profile:
            self._recorder = torch.profiler.profile(activities=[self._activity()])
            self._recorder.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._recorder is not None:
            self._wait()
            self._recorder.__exit__(None, None, None)
            self._turn.close()
            self.profiled = looked_into(self._recorder, self.seconds, self.device)
            control.should_training_stop = True
            return
        if state.global_step == 1:
            self._wait()
            self.first = time.perf_counter() - self._began
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
        if state.global_step >= self.warm:
            self._mark()
        timed = state.global_step - self.warm
        long = time.perf_counter() - self._timed_from > self.spend
        if timed >= LEAST and long:
            self._conclude()
            control.should_training_stop = not self.profile
            if not self.profile:
                self._turn.close()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._turn.close()

    def _mark(self) -> None:
        if not self._marks:
            self._turn.enter_context(quiet.alone(self._beside))
            self._wait()
            self._timed_from = time.perf_counter()
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def _conclude(self) -> None:
        self._wait()
        if self.device.type == "cuda":
            spans = [1e-3 * a.elapsed_time(b) for a, b in pairwise(self._marks)]
            self.peak_gib = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        else:
            spans = [b - a for a, b in pairwise(self._marks)]
        self.seconds, self.count = sorted(spans)[len(spans) // 2], len(spans)

    def _activity(self) -> Any:
        kinds = torch.profiler.ProfilerActivity
        return kinds.CUDA if self.device.type == "cuda" else kinds.CPU

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def looked_into(recorded: Any, seconds: float, device: torch.device) -> dict[str, Any]:
    """What bounds a step, by a profile of one.

    Args:
        recorded: the profile.
        seconds: of an unobserved step.
        device: whose time counts.

    Returns:
        busy: share of the unobserved step in which the device computes; kernels: launched; products: share of the busy
        time in matrix products; bound: launches, FLOPs (products take most of it) or bytes (the rest does); longest:
        name, launches and milliseconds of kernels; waits, gaps: milliseconds between kernels, where the host is waited
        for and where not (of a CUDA device).
    """
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    spent = {event.key: (getattr(event, name), event.count) for event in recorded.key_averages()}
    spent = {key: value for key, value in spent.items() if value[0] > 0}
    total = sum(time for time, _ in spent.values())
    products = sum(time for key, (time, _) in spent.items() if any(part in key.lower() for part in PRODUCTS))
    busy = min(1.0, 1e-6 * total / seconds)
    share = products / total if total else 0.0
    first = sorted(spent.items(), key=lambda item: -item[1][0])[:SHOWN]
    return {
        **(_between(recorded) if device.type == "cuda" else {}),
        "longest": [[key[:100], count, round(1e-3 * time, 3)] for key, (time, count) in first],
        "busy": round(busy, 4),
        "kernels": sum(count for _, count in spent.values()),
        "products": round(share, 4),
        "bound": "launches" if busy < BUSY else "FLOPs" if share > 0.5 else "bytes",
    }


def _between(recorded: Any) -> dict[str, float]:
    """Time without a kernel, from the first one to the last."""
    kernels = [event for event in recorded.events() if event.device_type == DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
    waits = gaps = 0.0
    done = spans[0][1] if spans else 0.0
    for start, end in spans:
        gap = max(0.0, start - done)
        if gap > 1e6 * WAITING:
            waits += gap
        else:
            gaps += gap
        done = max(done, end)
    return {"waits": round(1e-3 * waits, 3), "gaps": round(1e-3 * gaps, 3)}
