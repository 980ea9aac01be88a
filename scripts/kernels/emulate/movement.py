"""Instructions that move bits: between registers, from and to memory, at once or behind the block's back (cp.async)."""

from __future__ import annotations

import numpy as np

from emulate.faults import UnknownInstruction
from emulate.formats import TYPES, Array, unsigned
from emulate.memory import GlobalMemory, SharedMemory
from emulate.program import Instruction
from emulate.threads import Action, Threads, vector

HINTS = {"L1::evict_last", "L1::evict_first", "L1::no_allocate", "nc", "volatile", "v2", "v4", "v8"}
"""Modifiers of loads and stores that say where bytes are kept, which changes none of them, and how many there are."""


def build_move(instruction: Instruction, threads: Threads) -> Action:
    """mov: one register, several joined to a wide one, or a wide one taken apart."""
    instruction.only(())
    kind, (to, what) = instruction.type, instruction.operands
    if what.startswith("{"):
        return _join(kind, to, vector(what), threads)
    source = threads.source(what, kind)
    if not to.startswith("{"):
        target = threads.target(to)
        return lambda: target(source())
    targets = [threads.target(part) for part in vector(to)]
    part_bits = int(kind[1:]) // len(targets)
    narrow, wide = np.dtype(f"u{part_bits // 8}"), np.dtype(TYPES[kind]).type

    def apart() -> None:
        for i, target in enumerate(targets):
            target((source() >> wide(part_bits * i)).astype(narrow))

    return apart


def _join(kind: str, to: str, parts: list[str], threads: Threads) -> Action:
    target, wide = threads.target(to), np.dtype(TYPES[kind]).type
    bits = int(kind[1:]) // len(parts)
    sources = [threads.source(part, f"b{bits}") for part in parts]

    def action() -> None:
        found = np.zeros(threads.count, wide)
        for i, source in enumerate(sources):
            found |= source().astype(wide) << wide(bits * i)
        target(found)

    return action


def space(instruction: Instruction, threads: Threads) -> GlobalMemory | SharedMemory:
    """The memory that a load or store names.

    Raises:
        UnknownInstruction: it names none, or another one.
    """
    instruction.only(HINTS | {"global", "shared", "shared::cta"})
    if "global" in instruction.modifiers:
        return threads.global_memory
    if {"shared", "shared::cta"} & set(instruction.modifiers):
        return threads.shared_memory
    raise UnknownInstruction(instruction.text, "its memory")


def build_load(instruction: Instruction, threads: Threads) -> Action:
    """ld, also of a parameter."""
    if instruction.modifiers[:1] == ("param",):
        return _load_parameter(instruction, threads)
    memory, kind = space(instruction, threads), instruction.type
    names, address = vector(instruction.operands[0]), threads.address(instruction.operands[1])
    targets = [threads.target(name) for name in names]
    dtype = np.dtype(TYPES[kind])
    widths = [dtype if name == "_" else threads.register(name).dtype for name in names]
    if len(instruction.operands) > 2:
        raise UnknownInstruction(instruction.text, "the third operand")

    def action() -> None:
        found = memory.read(
            address(),
            dtype.itemsize * len(names),
            threads.mask,
            lambda kind: threads.report(kind, instruction.text),
        )
        for i, (target, width) in enumerate(zip(targets, widths, strict=True)):
            part = np.ascontiguousarray(found[:, dtype.itemsize * i :][:, : dtype.itemsize])
            value = part.view(unsigned(dtype))[:, 0]
            if dtype.itemsize < width.itemsize:
                value = (value.view(dtype) if kind[0] == "s" else value).astype(width)
            target(value)

    return action


def _load_parameter(instruction: Instruction, threads: Threads) -> Action:
    instruction.only({"param"})
    name, target = instruction.operands[1][1:-1].strip(), threads.target(instruction.operands[0])
    if name not in threads.arguments:
        raise UnknownInstruction(instruction.text, f"the parameter {name}")
    width = threads.register(instruction.operands[0]).dtype
    value = np.full(threads.count, threads.arguments[name])
    bits = value.view(unsigned(value.dtype)).astype(width)
    return lambda: target(bits)


def build_store(instruction: Instruction, threads: Threads) -> Action:
    """st."""
    memory, kind = space(instruction, threads), instruction.type
    address, size = threads.address(instruction.operands[0]), np.dtype(TYPES[kind]).itemsize
    sources = [threads.source(name, kind) for name in vector(instruction.operands[1])]
    if len(instruction.operands) > 2:
        raise UnknownInstruction(instruction.text, "the third operand")

    def action() -> None:
        parts = [as_bytes(source()).reshape(-1, size) for source in sources]
        memory.write(
            address(),
            np.concatenate(parts, 1),
            threads.mask,
            lambda kind: threads.report(kind, instruction.text),
        )

    return action


def as_bytes(x: Array) -> Array:
    """Numbers [T] as bytes."""
    return np.ascontiguousarray(x).view(np.uint8)


def build_copy(instruction: Instruction, threads: Threads) -> Action:
    """cp.async: from the device's memory to shared memory, there once its group is waited for.

    Until then what it will write over is NaN, so that a wait too few shows; threads of other warps see it behind the
    next barrier.

    Raises:
        UnknownInstruction: it is another kind of copy, as those of the tensor memory accelerator are.
    """
    parts = instruction.name.split(".")[1:]
    if parts[:1] != ["async"]:
        raise UnknownInstruction(instruction.text)
    if parts == ["async", "commit_group"]:
        return lambda: _commit(threads)
    if parts in (["async", "wait_group"], ["async", "wait_all"]):
        left = int(instruction.operands[0], 0) if instruction.operands else 0
        return lambda: _wait(threads, left, everything=parts[-1] == "wait_all")
    hints = {"L2::64B", "L2::128B", "L2::256B"}
    if set(parts) - {"async", "ca", "cg", "shared", "shared::cta", "global"} - hints:
        raise UnknownInstruction(instruction.text)
    to, what, count, *some = instruction.operands
    into, source, size = threads.address(to), threads.address(what), int(count, 0)
    wanted = threads.source(some[0], "u32") if some else None

    def report(kind: str) -> None:
        threads.report(kind, instruction.text)

    def action() -> None:
        mask, addresses = threads.mask.copy(), into().copy()
        bytes_read = np.minimum(wanted(), size) if wanted else np.full(threads.count, size)
        found = np.zeros((threads.count, size), np.uint8)
        for length in np.unique(bytes_read[mask & (bytes_read > 0)]):
            those = mask & (bytes_read == length)
            read = threads.global_memory.read(source(), int(length), those, report)
            found[those, :length] = read[those]
        threads.shared_memory.write(addresses, np.full_like(found, 0xFF), mask, report)
        threads.pending.append(lambda: threads.shared_memory.write(addresses, found, mask, report))

    return action


def _commit(threads: Threads) -> None:
    threads.groups.append(threads.pending)
    threads.pending = []


def _wait(threads: Threads, left: int, everything: bool) -> None:
    if everything:
        _commit(threads)
    while len(threads.groups) > left:
        for land in threads.groups.pop(0):
            land()
