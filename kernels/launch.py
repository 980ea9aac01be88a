"""Launching Triton kernels, or recording what would be launched, so that every configuration can be compiled ahead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from linearize.kernels.dispatch import VARIABLE, KernelError


@dataclass
class Launch:
    """One launch that was recorded and not made: the kernel, its arguments by name, and num_warps and the like."""

    kernel: Any
    arguments: dict[str, Any] = field(default_factory=dict)
    options: dict[str, int] = field(default_factory=dict)


records: list[Launch] | None = None
OPTIONS = ("num_warps", "num_stages", "maxnreg")


def registers(architecture: int) -> dict[str, int]:
    """Options that a launch gets on an architecture (80, 90) unless it has its own.

    On sm_80 ptxas by itself takes 32 registers for some large kernels and spills 50 KB. On sm_90 the same words make
    Triton 3.9's assembler spill where it would not.
    """
    return {"maxnreg": 255} if 80 <= architecture < 90 else {}


@cache
def _architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(device: torch.device) -> int:
    """Multiprocessors of the device; those of an H100 where launches are recorded, one in the interpreter."""
    if device.type != "cuda":
        return 1 if records is None else 132
    return _processors(torch.cuda.current_device() if device.index is None else device.index)


SHARED_MEMORY = {(9, 0): 232_448, (8, 0): 166_912}
"""Compute capability -> bytes of shared memory that one program may have; 101,376 on smaller devices."""


@torch.compiler.assume_constant_result
@cache
def _shared_memory(index: int) -> int:
    found = getattr(torch.cuda.get_device_properties(index), "shared_memory_per_block_optin", None)
    return int(found or SHARED_MEMORY.get(torch.cuda.get_device_capability(index), 101_376))


def shared_memory(device: torch.device) -> int:
    """Bytes that one program may have; those of an H100 where launches are recorded, no end in the interpreter."""
    if device.type != "cuda":
        return 2**40 if records is None else SHARED_MEMORY[9, 0]
    return _shared_memory(torch.cuda.current_device() if device.index is None else device.index)


def launch(kernel: Any, grid: tuple[int, ...], /, **arguments: Any) -> None:
    """``kernel[grid](**arguments)`` on the device of its tensors; nothing for an empty grid.

    Args:
        kernel: a `triton.jit` function.
        grid: up to three sizes.
        **arguments: the kernel's parameters by name, and num_warps, num_stages, maxnreg.

    Raises:
        KernelError: a program needs more than the device has.
    """
    if 0 in grid:
        return
    if records is not None:
        options = {name: value for name, value in arguments.items() if name in OPTIONS}
        rest = {name: value for name, value in arguments.items() if name not in OPTIONS}
        records.append(Launch(kernel, rest, options))
        return
    device = next((x.device for x in arguments.values() if isinstance(x, Tensor)), None)
    if device is None or device.type != "cuda":
        kernel[grid](**arguments)
        return
    current = torch.cuda.current_device()
    index = current if device.index is None else device.index
    arguments = registers(_architecture(index)) | arguments
    from triton.runtime.errors import OutOfResources

    try:
        with nullcontext() if index == current else torch.cuda.device(index):
            kernel[grid](**arguments)
    except OutOfResources as error:
        raise KernelError(out_of_resources(kernel, arguments, error)) from error


def out_of_resources(kernel: Any, arguments: dict[str, Any], error: Any) -> str:
    """What a launch lacks, with the operator, the sizes that it was compiled for, and the remedy."""
    operator = kernel.fn.__module__.rpartition(".")[0].rpartition(".")[2]
    sizes = {name: value for name, value in arguments.items() if name.isupper() and len(name) <= 3}
    dtype = next((x.dtype for x in arguments.values() if isinstance(x, Tensor)), None)
    listed = ", ".join(f"{name} {value}" for name, value in sizes.items())
    return (
        f"{operator}: its kernel {kernel.fn.__name__} needs {error.required:,} of {error.name}, and this device has "
        f"{error.limit:,} ({listed}, {dtype}). {VARIABLE}=torch runs the same function in torch, in linear memory but "
        "slower"
    )


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect launches instead of making them. Outputs stay uninitialized; kernels need no device."""
    global records
    before, records = records, []
    try:
        yield records
    finally:
        records = before
