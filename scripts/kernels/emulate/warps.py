"""Instructions of a warp's 32 threads together: matrix products, matrices from and to shared memory, exchanges."""

from __future__ import annotations

import numpy as np

from emulate.faults import UnknownInstruction
from emulate.formats import TYPES, Array, widen
from emulate.movement import as_bytes
from emulate.program import Instruction
from emulate.threads import WARP, Action, Threads, vector

PRODUCTS = {
    ("m16n8k16", "f16"),
    ("m16n8k16", "bf16"),
    ("m16n8k8", "f16"),
    ("m16n8k8", "bf16"),
    ("m16n8k8", "tf32"),
}
"""Shape and type of the factors; sums are float32."""
ROWS, PLACES = np.arange(WARP) // 4, np.arange(WARP) % 4
"""Where a thread's numbers stand in an 8 by 8 matrix: its row, and which quarter of it."""


def build_product(instruction: Instruction, threads: Threads) -> Action:
    """mma: [16, K] x [K, 8] + [16, 8], laid out over the warp's registers as PTX defines it.

    Raises:
        UnknownInstruction: other shapes, layouts or types.
    """
    shape, kind = instruction.modifiers[2], instruction.modifiers[-1]
    expected = ("sync", "aligned", shape, "row", "col", "f32", kind, kind)
    if instruction.modifiers != expected or instruction.type != "f32" or (shape, kind) not in PRODUCTS:
        raise UnknownInstruction(instruction.text, "the matrix product")
    size, count = int(shape.rpartition("k")[2]), threads.count // WARP
    targets = [threads.target(name) for name in vector(instruction.operands[0])]
    left, right = ([threads.source(x, "b32") for x in vector(part)] for part in instruction.operands[1:3])
    added = [threads.source(x, "f32") for x in vector(instruction.operands[3])]
    each = 1 if kind == "tf32" else 2  # numbers a register

    def factors(bits: Array) -> Array:
        x = np.ascontiguousarray(bits).reshape(count, WARP, 1)
        if kind == "tf32":
            return (x & np.uint32(0xFFFFE000)).view(np.float32)
        return widen(x.view(np.uint16), kind)

    def action() -> None:
        threads.whole_warps(instruction)
        a, b = np.zeros((count, 16, size)), np.zeros((count, size, 8))
        c = np.zeros((count, 16, 8))
        for i, register in enumerate(left):
            numbers = factors(register())
            for j in range(each):
                a[:, ROWS + 8 * (i % 2), each * PLACES + j + size // 2 * (i // 2)] = numbers[..., j]
        for i, register in enumerate(right):
            numbers = factors(register())
            for j in range(each):
                b[:, each * PLACES + j + size // len(right) * i, ROWS] = numbers[..., j]
        for i, register in enumerate(added):
            c[:, ROWS + 8 * (i // 2), 2 * PLACES + i % 2] = register().reshape(count, WARP)
        found = (a @ b + c).astype(np.float32)
        for i, target in enumerate(targets):
            target(np.ascontiguousarray(found[:, ROWS + 8 * (i // 2), 2 * PLACES + i % 2]).reshape(-1))

    return action


def _matrices(instruction: Instruction) -> bool:
    """Whether ldmatrix or stmatrix transposes.

    Raises:
        UnknownInstruction: not of 8 by 8 matrices of 16-bit numbers.
    """
    instruction.only({"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta"})
    if instruction.type != "b16" or "m8n8" not in instruction.modifiers:
        raise UnknownInstruction(instruction.text)
    return "trans" in instruction.modifiers


def build_load_matrix(instruction: Instruction, threads: Threads) -> Action:
    """ldmatrix: threads 8 i to 8 i + 7 say where the rows of matrix i are."""
    transposed, warps = _matrices(instruction), threads.count // WARP
    targets = [threads.target(name) for name in vector(instruction.operands[0])]
    address = threads.address(instruction.operands[1])

    def action() -> None:
        threads.whole_warps(instruction)
        asking = threads.mask & (threads.lane < 8 * len(targets))
        found = threads.shared_memory.read(
            address(), 16, asking, lambda kind: threads.report(kind, instruction.text)
        )
        rows = found.view(np.uint16).reshape(warps, 4, 8, 8)
        for i, target in enumerate(targets):
            matrix = rows[:, i].transpose(0, 2, 1) if transposed else rows[:, i]
            target(np.ascontiguousarray(matrix).view(np.uint32).reshape(-1))

    return action


def build_store_matrix(instruction: Instruction, threads: Threads) -> Action:
    """stmatrix: as ldmatrix, the other way."""
    transposed, warps = _matrices(instruction), threads.count // WARP
    sources = [threads.source(name, "b32") for name in vector(instruction.operands[1])]
    address = threads.address(instruction.operands[0])

    def action() -> None:
        threads.whole_warps(instruction)
        rows = np.zeros((warps, 4, 8, 8), np.uint16)
        for i, source in enumerate(sources):
            matrix = np.ascontiguousarray(source()).view(np.uint16).reshape(warps, 8, 8)
            rows[:, i] = matrix.transpose(0, 2, 1) if transposed else matrix
        threads.shared_memory.write(
            address(),
            as_bytes(rows).reshape(threads.count, 16),
            threads.mask & (threads.lane < 8 * len(sources)),
            lambda kind: threads.report(kind, instruction.text),
        )

    return action


def build_shuffle(instruction: Instruction, threads: Threads) -> Action:
    """shfl: a number of another thread of the warp, or its own where there is none.

    Raises:
        UnknownInstruction: also says whether there was one.
    """
    instruction.only({"sync", "bfly", "idx", "up", "down"})
    mode = instruction.modifiers[-1]
    if "|" in instruction.operands[0] or mode == "sync":
        raise UnknownInstruction(instruction.text)
    target, values = threads.target(instruction.operands[0]), threads.source(instruction.operands[1], "b32")
    by, limits = (threads.source(operand, "u32") for operand in instruction.operands[2:4])
    lane = threads.lane

    def action() -> None:
        threads.whole_warps(instruction)
        step, limit = by().astype(np.int64) & 31, limits().astype(np.int64)
        segment, clamp = (limit >> 8) & 31, limit & 31
        last = (lane & segment) | (clamp & ~segment)
        other = {
            "bfly": lane ^ step,
            "idx": (lane & segment) | (step & ~segment),
            "up": lane - step,
            "down": lane + step,
        }[mode]
        there = other >= last if mode == "up" else other <= last
        target(values()[threads.number - lane + np.where(there, other, lane)])

    return action


def build_reduction(instruction: Instruction, threads: Threads) -> Action:
    """redux: one number of all of a warp's.

    Raises:
        UnknownInstruction: not of 32-bit integers.
    """
    instruction.only({"sync", "min", "max", "add", "or", "and", "xor"})
    kind = instruction.type
    if kind not in ("s32", "u32", "b32"):
        raise UnknownInstruction(instruction.text, f"the type {kind}")
    target, source = threads.target(instruction.operands[0]), threads.source(instruction.operands[1], kind)
    function = {
        "min": np.minimum,
        "max": np.maximum,
        "add": np.add,
        "or": np.bitwise_or,
        "and": np.bitwise_and,
        "xor": np.bitwise_xor,
    }[instruction.modifiers[-1]]

    def action() -> None:
        threads.whole_warps(instruction)
        found = function.reduce(source().reshape(-1, WARP), axis=1, dtype=TYPES[kind])
        target(np.repeat(found, WARP))

    return action
