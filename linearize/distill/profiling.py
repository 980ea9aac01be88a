"""A trace of some steps of a stage, for chrome://tracing or Perfetto."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from linearize import launched

log = logging.getLogger(__name__)

WARM = 8
"""Steps before the trace: kernels compile, and a CUDA graph is recorded."""
TRACED = 3
"""Steps of the trace."""


class Traced(TrainerCallback):
    """Writes a trace of the first steps that are as all later ones, in every process.

    Args:
        folder: of the run; the file is `trace-<stage>.json`, with the process's number where there are several.
        stage: name.
        device: where it trains.
    """

    def __init__(self, folder: Path, stage: str, device: torch.device) -> None:
        number = f"-{launched.rank()}" if launched.several() else ""
        self.path = folder / f"trace-{stage}{number}.json"
        self.device = device
        self._first = self._last = 0
        self._trace: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        left = state.max_steps - state.global_step
        self._first = state.global_step + max(0, min(WARM, left - TRACED))
        self._last = min(self._first + TRACED, state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trace is None and state.global_step == self._first:
            activities = [ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._trace = profile(activities=activities)
            self._trace.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trace is not None and state.global_step >= self._last:
            self._write()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write()

    def _write(self) -> None:
        if self._trace is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        trace, self._trace, self._first = self._trace, None, -1
        trace.stop()
        trace.export_chrome_trace(str(self.path))
        log.info("trace of %d steps: %s", TRACED, self.path)
