"""A block's threads side by side: registers as arrays with a number a thread, and which threads take part."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from emulate.faults import Faults, UnknownInstruction
from emulate.formats import TYPES, Array, unsigned
from emulate.memory import GlobalMemory, SharedMemory
from emulate.program import Instruction, Program

Source = Callable[[], Array]
Target = Callable[[Array], None]
Action = Callable[[], None]
WARP = 32


class Threads:
    """What the instructions of one block work on.

    Args:
        program: gives the types of the registers.
        count: threads of a block.
        arguments: parameter -> its bits.
        grid: blocks along x, y, z.
        memory: the device's.
        shared: bytes of shared memory a block.
    """

    def __init__(
        self,
        program: Program,
        count: int,
        arguments: dict[str, Array],
        grid: tuple[int, ...],
        memory: GlobalMemory,
        shared: int,
    ) -> None:
        self.program, self.count, self.arguments, self.grid = program, count, arguments, grid
        self.faults = Faults()
        self.number = np.arange(count)
        self.lane = self.number % WARP
        self.block: tuple[int, ...] = (0, 0, 0)
        self.everyone = np.ones(count, bool)
        self.mask = self.everyone
        self.global_memory, self.shared_memory = memory, SharedMemory(shared, count)
        self.pending: list[Action] = []
        self.groups: list[list[Action]] = []
        """Copies under way (`cp.async`): of the group that is open, and of those behind a commit."""
        self._registers: dict[str, Array] = {}

    def begin(self, block: tuple[int, ...]) -> None:
        """Another block: registers and shared memory hold nothing that may be used (all bits set)."""
        self.block, self.mask, self.pending, self.groups = block, self.everyone, [], []
        for register in self._registers.values():
            register.fill(True if register.dtype == bool else np.iinfo(register.dtype).max)
        self.shared_memory.clear()
        self.global_memory.begin(self.grid_number)

    @property
    def grid_number(self) -> int:
        """Of the block, from 1 on."""
        x, y, z = self.block
        return 1 + x + self.grid[0] * (y + self.grid[1] * z)

    def report(self, kind: str, text: str) -> None:
        """A fault of the block that runs."""
        self.faults.report(kind, text, self.block)

    def register(self, name: str) -> Array:
        """Bits of a register, one a thread; predicates as bool.

        Raises:
            UnknownInstruction: it is not declared.
        """
        if name not in self._registers:
            declared = self.program.registers
            kind = declared.get(name) or declared.get(name.rstrip("0123456789"))
            if kind not in TYPES:
                raise UnknownInstruction(name, "the register")
            self._registers[name] = np.zeros(self.count, bool if kind == "pred" else unsigned(TYPES[kind]))
        return self._registers[name]

    def source(self, operand: str, kind: str) -> Source:
        """A function that gives an operand as numbers of a PTX type: register, special register or constant.

        Raises:
            UnknownInstruction: it is none of these.
        """
        dtype = np.dtype(TYPES[kind])
        if operand.startswith("!"):
            negated = self.register(operand[1:])
            return lambda: ~negated
        if (special := self._special(operand)) is not None:
            return lambda: special().astype(dtype)
        if operand.startswith("%") or operand in self.program.registers:
            register = self.register(operand)
            if register.dtype == dtype:
                return lambda: register
            if register.dtype.itemsize == dtype.itemsize and dtype.kind != "b":
                view = register.view(dtype)
                return lambda: view
            if register.dtype.itemsize > dtype.itemsize and dtype.kind != "b":
                return lambda: register.astype(unsigned(dtype)).view(dtype)
            raise UnknownInstruction(f"{operand} as {kind}", "the operand")
        constant = np.full(self.count, _constant(operand, dtype))
        return lambda: constant

    def _special(self, operand: str) -> Source | None:
        axis = "xyz".find(operand[-1:])
        zeros = np.zeros(self.count, np.uint32)
        sources: dict[str, Source] = {
            "%tid": lambda: zeros if axis else self.number,
            "%ctaid": lambda: zeros + np.uint32(self.block[axis]),
            "%nctaid": lambda: zeros + np.uint32(self.grid[axis]),
        }
        if operand == "%laneid":
            return lambda: self.lane
        return sources.get(operand[:-2]) if operand[-2:] in (".x", ".y", ".z") else None

    def target(self, operand: str) -> Target:
        """A function that writes numbers to a register, for the threads that take part."""
        if operand == "_":
            return lambda values: None
        register = self.register(operand)

        def put(values: Array) -> None:
            if values.dtype != register.dtype:
                same = values.dtype.itemsize == register.dtype.itemsize and values.dtype != bool
                values = values.view(register.dtype) if same else values.astype(register.dtype)
            np.copyto(register, values, where=self.mask)

        return put

    def address(self, operand: str) -> Source:
        """A function that gives `[register + offset]` as int64, one a thread.

        Raises:
            UnknownInstruction: it is something else.
        """
        found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if found is None:
            raise UnknownInstruction(operand, "the address")
        base, offset = found[1], int(found[2] or "0", 0)
        kind = f"u{8 * self.register(base).dtype.itemsize}" if base.startswith("%") else "u32"
        bits = self.source(base, kind)
        return lambda: bits().astype(np.int64) + offset

    def whole_warps(self, instruction: Instruction) -> None:
        """Report an instruction of whole warps that some threads of one do not reach."""
        taking = self.mask.reshape(-1, WARP)
        if (taking.any(1) & ~taking.all(1)).any():
            self.report("some threads of a warp alone", instruction.text)


def vector(operand: str) -> list[str]:
    """The parts of `{a, b}`; of anything else, itself."""
    return [x.strip() for x in operand[1:-1].split(",")] if operand.startswith("{") else [operand]


def _constant(operand: str, dtype: np.dtype) -> Array:
    """A number as PTX writes it: 0f and 0d floats in hexadecimal, integers, and the beginning of shared memory."""
    if operand == "global_smem":
        return np.zeros((), dtype)
    if operand[:2] in ("0f", "0d"):
        bits = np.array(int(operand[2:], 16), np.uint32 if operand[1] == "f" else np.uint64)
        if bits.dtype.itemsize != dtype.itemsize:
            raise UnknownInstruction(operand, f"a constant of {8 * dtype.itemsize} bits")
        return bits.view(dtype)
    try:
        value = int(operand.rstrip("U"), 0)
    except ValueError:
        raise UnknownInstruction(operand, "the operand") from None
    if dtype.kind == "b":
        return np.array(bool(value))
    return np.array(value & ((1 << 8 * dtype.itemsize) - 1), unsigned(dtype)).view(dtype)
