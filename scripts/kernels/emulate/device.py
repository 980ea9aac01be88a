"""A stand-in for `linearize.kernels.launch.launch`: compiles a launch for a GPU that is not there, and emulates it.

Tensors' storages are copied to addresses of their own, with a gap between them in which no byte is valid, and back
behind the launch. What a kernel reads of a storage outside its tensor's view is not seen.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from aot import kernel_name, specialized

from emulate.block import run
from emulate.faults import EmulationError
from emulate.formats import Array
from emulate.memory import GlobalMemory
from emulate.program import Program, parse
from linearize.kernels import dispatch
from linearize.kernels import launch as launches

GAP = 4096
"""Bytes in front of each storage and behind the last."""
WARP = 32
SCALARS: dict[str, Any] = {"i1": np.uint8, "i32": np.int32, "i64": np.int64, "fp32": np.float32}


@dataclass(frozen=True)
class Emulated:
    """One launch that was made here."""

    kernel: str
    grid: tuple[int, ...]
    warps: int
    seconds: float
    """To run it, the compiler's time aside."""


class Device:
    """Compiles each kernel once and runs its launches.

    Args:
        arch: 90, or 80, where products of matrices are mma and not wgmma.
    """

    def __init__(self, arch: int = 90) -> None:
        self.arch = arch
        self.made: list[Emulated] = []
        self._compiled: dict[Any, tuple[Any, Program]] = {}

    def launch(self, kernel: Any, grid: tuple[int, ...], /, **arguments: Any) -> None:
        """As `linearize.kernels.launch.launch`.

        Raises:
            UnknownInstruction: the kernel has an instruction that is not modelled.
            EmulationError: the kernel reads or writes what it may not.
        """
        if 0 in grid:
            return
        options = {name: value for name, value in arguments.items() if name in launches.OPTIONS}
        rest = {name: value for name, value in arguments.items() if name not in launches.OPTIONS}
        launch = launches.Launch(kernel, rest, options)
        signature, constants, attributes = specialized(launch)
        for index, parameter in enumerate(kernel.params):
            value = rest.get(parameter.name)
            if isinstance(value, torch.Tensor) and _offset(value) % 16:
                attributes.pop((index,))
        made, program = self._compile(launch, (signature, constants, attributes))
        began = time.perf_counter()
        storages = _Storages(rest)
        values: list[Any] = [
            storages.address(value)
            if isinstance(value, torch.Tensor)
            else np.array(value).astype(SCALARS[signature[name]])
            for name, value in ((p.name, rest.get(p.name, p.default)) for p in kernel.params)
            if signature[name] != "constexpr"
        ]
        # what the compiler adds behind them is memory of its own, which no kernel of ours asks for
        spare: list[Any] = [np.uint64(0)] * (len(program.parameters) - len(values))
        whole = (*grid, 1, 1)[:3]
        faults = run(
            program,
            WARP * made.metadata.num_warps,
            dict(zip(program.parameters, [*values, *spare], strict=True)),
            whole,
            storages.memory,
            made.metadata.shared,
        )
        storages.bring_back()
        name = kernel_name(launch)
        self.made.append(Emulated(name, whole, made.metadata.num_warps, time.perf_counter() - began))
        if found := faults.lines():
            raise EmulationError(f"{name} on a grid of {whole}:\n" + "\n".join(found))

    def _compile(self, launch: launches.Launch, specialization: tuple[Any, ...]) -> tuple[Any, Program]:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        options = launches.registers(self.arch) | launch.options
        parts = (repr(sorted(part.items())) for part in (*specialization, options))
        key = (launch.kernel.fn.__module__, launch.kernel.fn.__qualname__, *parts)
        if key not in self._compiled:
            source = ASTSource(launch.kernel, *specialization)
            made = triton.compile(source, target=GPUTarget("cuda", self.arch, WARP), options=options)
            self._compiled[key] = made, parse(made.asm["ptx"])
        return self._compiled[key]


def _offset(x: torch.Tensor) -> int:
    """Bytes from the beginning of its storage."""
    return int(x.storage_offset()) * x.element_size()


class _Storages:
    """The storages of a launch's tensors, each once, in an emulated memory."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.begins: dict[Any, tuple[int, Array]] = {}
        end = GAP
        for value in arguments.values():
            if isinstance(value, torch.Tensor) and (key := _key(value)) not in self.begins:
                held = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).numpy()
                self.begins[key] = end, held
                end += -(-held.size // 256) * 256 + GAP
        contents, valid = np.full(end, 0xFF, np.uint8), np.zeros(end, bool)
        for begin, held in self.begins.values():
            contents[begin : begin + held.size] = held
            valid[begin : begin + held.size] = True
        self.memory = GlobalMemory(contents, valid)

    def address(self, x: torch.Tensor) -> Any:
        """Of a tensor's first number."""
        return np.uint64(self.begins[_key(x)][0] + _offset(x))

    def bring_back(self) -> None:
        """What the kernel wrote, into the tensors."""
        for begin, held in self.begins.values():
            held[:] = self.memory.contents[begin : begin + held.size]


def _key(x: torch.Tensor) -> Any:
    """Of its storage; empty ones are not shared."""
    return x.untyped_storage().data_ptr() or id(x)


@contextmanager
def emulated(arch: int = 90) -> Iterator[Device]:
    """Inside, launches on CPU tensors run as compiled for a GPU. Kernels have to be defined with TRITON_INTERPRET=0.

    Args:
        arch: see `Device`.
    """
    device = Device(arch)
    limit = launches.SHARED_MEMORY[arch // 10, arch % 10]
    swapped = [
        ("launch", launches.launch, device.launch),
        ("shared_memory", launches.shared_memory, lambda device: limit),
        ("interpreted", dispatch.interpreted, lambda: True),
    ]

    def swap(name: str, one: Any, other: Any) -> None:
        # modules that have imported it hold it under its name
        for module in list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get(name) is one:
                setattr(module, name, other)

    for name, real, ours in swapped:
        swap(name, real, ours)
    try:
        yield device
    finally:
        for name, real, ours in swapped:
            swap(name, ours, real)
