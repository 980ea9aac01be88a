"""Instructions that make numbers of numbers, each thread for itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from emulate.faults import UnknownInstruction
from emulate.formats import PAIRS, TYPES, Array, flush, is_float, narrow, unsigned, widen
from emulate.program import Instruction
from emulate.threads import Action, Threads

Function = Callable[..., Array]
EXACT: dict[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "sqrt": np.sqrt,
    "abs": np.abs,
    "neg": np.negative,
}
"""Operations of floats that numpy rounds as a GPU does, in their own type."""
WIDE: dict[str, Function] = {
    "fma": lambda x, y, z: x * y + z,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}
"""Those that are made in float64 and rounded once: a product of float32 numbers is exact there."""
INTEGER: dict[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": lambda x, y, z: x * y + z,
    "min": np.minimum,
    "max": np.maximum,
    "abs": np.abs,
    "neg": np.negative,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
}
ROUNDED = {"ftz", "rn", "approx", "full", "NaN"}
"""Modifiers of floats that say no more than what is done here anyway, but for ftz and NaN, which are looked at."""


def build_arithmetic(instruction: Instruction, threads: Threads) -> Action:
    """add, fma, max, ... of floats, integers, predicates, and pairs of 16-bit floats.

    Raises:
        UnknownInstruction: the operation has no such type or modifier.
    """
    kind = PAIRS.get(instruction.type, instruction.type)
    if kind not in TYPES:
        raise UnknownInstruction(instruction.text, f"the type {kind}")
    target, operands = threads.target(instruction.operands[0]), instruction.operands[1:]
    if not is_float(kind):
        if {"wide", "hi"} & set(instruction.modifiers):
            return _wide_product(instruction, threads)
        if instruction.operation in ("div", "rem"):
            return _division(instruction, threads)
        instruction.only({"lo"})
        if instruction.operation not in INTEGER:
            raise UnknownInstruction(instruction.text)
        whole, integers = INTEGER[instruction.operation], [threads.source(x, kind) for x in operands]
        return lambda: target(whole(*(x() for x in integers)))
    instruction.only(ROUNDED)
    function, flushed = _float_function(instruction, kind), "ftz" in instruction.modifiers
    pair, half = instruction.type in PAIRS, kind in ("f16", "bf16")
    sources = [threads.source(x, "b32" if pair else "b16" if half else kind) for x in operands]

    def numbers(bits: Array) -> Array:
        x = widen(np.ascontiguousarray(bits).view(np.uint16), kind) if half else bits
        return flush(x) if flushed and x.dtype == np.float32 and not half else x

    def action() -> None:
        found = function(*(numbers(x()) for x in sources))
        if flushed and found.dtype == np.float32 and not half:
            found = flush(found)
        if half:
            found = narrow(found, kind)
        target(found.view(np.uint32) if pair else found)

    return action


def _float_function(instruction: Instruction, kind: str) -> Function:
    name = instruction.operation
    if name in EXACT:
        return EXACT[name]
    if name in ("min", "max"):
        numbers = {"min": np.fmin, "max": np.fmax}
        return ({"min": np.minimum, "max": np.maximum} if "NaN" in instruction.modifiers else numbers)[name]
    if name in WIDE:
        function = WIDE[name]
        # 16-bit floats come as float32, whose rounding is followed by their own
        to = np.float64 if kind == "f64" else np.float32
        return lambda *operands: function(*(x.astype(np.float64) for x in operands)).astype(to)
    raise UnknownInstruction(instruction.text)


def _wide_product(instruction: Instruction, threads: Threads) -> Action:
    """mul.wide and mad.wide, and mul.hi: products of twice as many bits, of which `hi` are the upper ones."""
    instruction.only({"wide", "hi"})
    kind, high = instruction.type, "hi" in instruction.modifiers
    bits = 8 * np.dtype(TYPES[kind]).itemsize
    if instruction.operation not in (("mul",) if high else ("mul", "mad")) or bits > (64 if high else 32):
        raise UnknownInstruction(instruction.text)
    target, wide = threads.target(instruction.operands[0]), f"{kind[0]}{2 * bits}"
    x, y = (threads.source(operand, kind) for operand in instruction.operands[1:3])
    if high:

        def upper() -> None:
            products = x().astype(object) * y().astype(object)  # Python's integers, which have no end
            found = [(int(product) >> bits) & ((1 << bits) - 1) for product in products]
            target(np.array(found, unsigned(TYPES[kind])))

        return upper
    added = threads.source(instruction.operands[3], wide) if instruction.operation == "mad" else None
    as_wide = TYPES[wide]

    def action() -> None:
        product = x().astype(as_wide) * y().astype(as_wide)
        target(product if added is None else product + added())

    return action


def _division(instruction: Instruction, threads: Threads) -> Action:
    """Toward zero; the remainder has the dividend's sign. By zero there is none, and here it is 0."""
    instruction.only(())
    kind, target = instruction.type, threads.target(instruction.operands[0])
    x, y = (threads.source(operand, kind) for operand in instruction.operands[1:])

    def action() -> None:
        dividend, divisor = x(), np.where(y() == 0, 1, y())
        rest = np.where(y() == 0, 0, np.fmod(dividend, divisor)).astype(dividend.dtype)
        if instruction.operation == "rem":
            target(rest)
        else:
            target(np.where(y() == 0, 0, (dividend - rest) // divisor).astype(dividend.dtype))

    return action


def build_shift(instruction: Instruction, threads: Threads) -> Action:
    """shl and shr; as many places as there are bits, or more, shift everything out."""
    instruction.only(())
    kind, left = instruction.type, instruction.operation == "shl"
    target, x = threads.target(instruction.operands[0]), threads.source(instruction.operands[1], kind)
    by, bits = threads.source(instruction.operands[2], "u32"), 8 * np.dtype(TYPES[kind]).itemsize

    def action() -> None:
        values, places = x(), by().astype(np.int64)
        some = np.minimum(places, bits - 1).astype(values.dtype)
        found = values << some if left else values >> some
        if left or kind[0] != "s":
            found = np.where(places >= bits, 0, found).astype(values.dtype)
        target(found)

    return action


def build_funnel_shift(instruction: Instruction, threads: Threads) -> Action:
    """shf: 32 of the 64 bits of two registers, the lower one first."""
    instruction.only({"l", "r", "wrap", "clamp"})
    target = threads.target(instruction.operands[0])
    low, high, by = (threads.source(operand, "u32") for operand in instruction.operands[1:])
    left, wrap = "l" in instruction.modifiers, "wrap" in instruction.modifiers

    def action() -> None:
        places = (by() & np.uint32(31) if wrap else np.minimum(by(), 32)).astype(np.uint64)
        both = low().astype(np.uint64) | (high().astype(np.uint64) << np.uint64(32))
        target(((both << places) >> np.uint64(32) if left else both >> places).astype(np.uint32))

    return action


def build_bits(instruction: Instruction, threads: Threads) -> Action:
    """bfe and bfi: some bits of a number, taken out or put in.

    Raises:
        UnknownInstruction: of 64-bit numbers.
    """
    instruction.only(())
    kind, target = instruction.type, threads.target(instruction.operands[0])
    if np.dtype(TYPES[kind]).itemsize != 4:
        raise UnknownInstruction(instruction.text, f"the type {kind}")
    *values, at, length = instruction.operands[1:]
    sources = [threads.source(operand, kind) for operand in values]
    begin, count = threads.source(at, "u32"), threads.source(length, "u32")

    def extract() -> None:
        first, size = (x().astype(np.int64) & 255 for x in (begin, count))
        found = (sources[0]().astype(np.int64) >> np.minimum(first, 63)) & ((1 << np.minimum(size, 62)) - 1)
        if kind[0] == "s":
            negative = (found >> np.clip(size - 1, 0, 63)) & 1
            found = np.where((size > 0) & (negative == 1), found - (1 << np.minimum(size, 62)), found)
        target(found.astype(TYPES[kind]))

    def insert() -> None:
        first, size = (np.minimum(x().astype(np.int64) & 255, 32) for x in (begin, count))
        hole = ((1 << size) - 1) << first
        inserted, base = (x().astype(np.int64) for x in sources)
        target((((inserted << first) & hole) | (base & ~hole)).astype(np.uint32))

    return extract if instruction.operation == "bfe" else insert


def build_logic(instruction: Instruction, threads: Threads) -> Action:
    """lop3: any function of three bits, given by its table."""
    instruction.only(())
    target, table = threads.target(instruction.operands[0]), int(instruction.operands[4], 0)
    sources = [threads.source(operand, "b32") for operand in instruction.operands[1:4]]

    def action() -> None:
        values, found = [x() for x in sources], np.zeros(threads.count, np.uint32)
        for row in (row for row in range(8) if table >> row & 1):
            chosen = [x if row >> (2 - i) & 1 else ~x for i, x in enumerate(values)]
            found |= chosen[0] & chosen[1] & chosen[2]
        target(found)

    return action


def build_permute(instruction: Instruction, threads: Threads) -> Action:
    """prmt: four of the eight bytes of two registers, or of one's sign."""
    instruction.only(())
    target = threads.target(instruction.operands[0])
    low, high, choice = (threads.source(operand, "b32") for operand in instruction.operands[1:])

    def action() -> None:
        both = np.stack([np.ascontiguousarray(low()), np.ascontiguousarray(high())], 1).view(np.uint8)
        found = np.zeros((threads.count, 4), np.uint8)
        for i in range(4):
            selected = (choice() >> np.uint32(4 * i)).astype(np.int64)
            value = both[threads.number, selected & 7]
            sign = np.where(value & 0x80, np.uint8(0xFF), np.uint8(0))
            found[:, i] = np.where(selected & 8, sign, value)
        target(found.view(np.uint32)[:, 0])

    return action


def build_count(instruction: Instruction, threads: Threads) -> Action:
    """popc: how many bits are set."""
    instruction.only(())
    target = threads.target(instruction.operands[0])
    source = threads.source(instruction.operands[1], instruction.type)

    def action() -> None:
        found = np.ascontiguousarray(source()).view(np.uint8).reshape(threads.count, -1)
        target(np.unpackbits(found, axis=1).sum(1, dtype=np.uint32))

    return action
