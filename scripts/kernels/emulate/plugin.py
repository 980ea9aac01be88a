"""For pytest: every launch of a Triton kernel in its tests is emulated."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # Triton reads it when kernels are defined; tests/conftest.py keeps it
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests put their tensors on a GPU where there is one

import pytest
import torch

from emulate.device import Device, emulated

ARCH = "LINEARIZE_EMULATED_ARCH"
DEVICE = pytest.StashKey[Device]()


def pytest_configure(config: pytest.Config) -> None:
    """Put the emulator in the place of launches, and expect a GPU's accuracy."""
    import kernel_calls

    # as on a GPU, where products of float32 are three of tf32
    kernel_calls.TOLERANCE[torch.float32] = 1e-4
    stack = ExitStack()
    config.stash[DEVICE] = stack.enter_context(emulated(int(os.environ.get(ARCH, "90"))))
    config.add_cleanup(stack.close)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What was run."""
    made = config.stash[DEVICE].made
    seconds: dict[str, list[float]] = {}
    for launch in made:
        seconds.setdefault(launch.kernel, []).append(launch.seconds)
    terminalreporter.section("emulated launches")
    for kernel, each in sorted(seconds.items()):
        terminalreporter.write_line(f"{kernel:32} {len(each):4} launches {sum(each):8.1f} s")
    if not made:
        terminalreporter.write_line("none: no kernel was launched, so that nothing was looked at")
