"""Instructions that compare numbers, choose between them, or make another type of them."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np

from emulate.faults import UnknownInstruction
from emulate.formats import PAIRS, TYPES, Array, flush, is_float, narrow, to_integer, to_tf32, widen
from emulate.program import Instruction
from emulate.threads import Action, Threads

ORDERED: dict[str, Callable[[Array, Array], Array]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
JOINED: dict[str, Callable[[Array, Array], Array]] = {
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}
TO_WHOLE: dict[str, Callable[[Array], Array]] = {
    "rzi": np.trunc,
    "rni": np.rint,
    "rmi": np.floor,
    "rpi": np.ceil,
}


def as_float(bits: Array, kind: str) -> Array:
    """Numbers of a type that numpy may not have."""
    return widen(bits, kind) if kind == "bf16" else bits


def compared(comparison: str, x: Array, y: Array, of_floats: bool) -> Array:
    """A comparison by its name; of floats those that end in "u" hold where one is NaN."""
    if not of_floats:
        return ORDERED[UNSIGNED.get(comparison, comparison)](x, y)
    nan = np.isnan(x) | np.isnan(y)
    if comparison in ("num", "nan"):
        return nan if comparison == "nan" else ~nan
    if comparison in ORDERED:
        return ORDERED[comparison](x, y) & ~nan
    return ORDERED[comparison[:-1]](x, y) | nan


def build_compare(instruction: Instruction, threads: Threads) -> Action:
    """setp, with another predicate joined to what it finds, and a second target for its opposite.

    Raises:
        UnknownInstruction: there is no such comparison.
    """
    comparison, *rest = instruction.modifiers
    joined = next((JOINED[x] for x in rest if x in JOINED), None)
    kind, flushed = instruction.type, "ftz" in rest
    of_floats = is_float(kind)
    allowed = {
        *ORDERED,
        *((f"{x}u" for x in ORDERED) if of_floats else UNSIGNED),
        *("num", "nan") * of_floats,
    }
    if comparison not in allowed or set(rest) - {"ftz", *JOINED} or kind not in TYPES:
        raise UnknownInstruction(instruction.text)
    found, _, opposite = instruction.operands[0].partition("|")
    target = threads.target(found)
    other = threads.target(opposite) if opposite else None
    x, y = (threads.source(operand, kind) for operand in instruction.operands[1:3])
    third = threads.source(instruction.operands[3], "pred") if joined else None

    def action() -> None:
        left, right = as_float(x(), kind), as_float(y(), kind)
        if flushed:
            left, right = flush(left), flush(right)
        holds = compared(comparison, left, right, of_floats)
        fails = ~holds
        if joined and third:
            holds, fails = joined(holds, third()), joined(fails, third())
        target(holds)
        if other:
            other(fails)

    return action


def build_select(instruction: Instruction, threads: Threads) -> Action:
    """selp: one of two numbers."""
    instruction.only(())
    target = threads.target(instruction.operands[0])
    x, y = (threads.source(operand, instruction.type) for operand in instruction.operands[1:3])
    chosen = threads.source(instruction.operands[3], "pred")
    return lambda: target(np.where(chosen(), x(), y()))


def build_convert(instruction: Instruction, threads: Threads) -> Action:
    """cvt between integers and floats, and of floats to whole ones.

    Two float32 go into a pair of 16-bit floats, the first operand into its high half.

    Raises:
        UnknownInstruction: there is no such conversion, rounding or type here.
    """
    *modifiers, to = instruction.modifiers
    kind, target = instruction.type, threads.target(instruction.operands[0])
    sources = [threads.source(operand, kind) for operand in instruction.operands[1:] if kind in TYPES]
    narrows = (to, kind) in (("f16", "f32"), ("bf16", "f32"), ("f32", "f64"), ("tf32", "f32"), ("f16", "f64"))
    rounding = {"rna"} if to == "tf32" else {"rn"} if narrows or to in PAIRS else set()
    if is_float(kind) and to in TYPES and (not is_float(to) or to == kind in ("f32", "f64")):
        rounding = set(TO_WHOLE)
    elif is_float(to) and not is_float(kind):
        rounding = {"rn"}
    given, flushed = set(modifiers) - {"ftz"}, "ftz" in modifiers
    if not sources or to not in {*TYPES, *PAIRS, "tf32"} or given - rounding or (rounding and not given):
        raise UnknownInstruction(instruction.text, "the conversion")
    if to in PAIRS or to == "tf32":
        if kind != "f32" or flushed or len(sources) != (1 if to == "tf32" else 2):
            raise UnknownInstruction(instruction.text, "the conversion")
        return _into_pair(to, threads, instruction) if to in PAIRS else lambda: target(to_tf32(sources[0]()))
    whole = TO_WHOLE[next(iter(given))] if given & set(TO_WHOLE) else None
    width = threads.register(instruction.operands[0]).dtype

    def action() -> None:
        x = as_float(sources[0](), kind)
        if flushed and x.dtype == np.float32:
            x = flush(x)
        if to == "bf16":
            target(narrow(x.astype(np.float32), to))
            return
        x = whole(x) if whole else x
        found = to_integer(x, to) if whole and not is_float(to) else x.astype(TYPES[to])
        if not is_float(to) and found.dtype.itemsize < width.itemsize:
            found = found.astype(np.int64).astype(width)  # a register's upper bits are the number's sign
        target(found)

    return action


def _into_pair(to: str, threads: Threads, instruction: Instruction) -> Action:
    target = threads.target(instruction.operands[0])
    high, low = (threads.source(operand, "f32") for operand in instruction.operands[1:])
    half = PAIRS[to]

    def action() -> None:
        upper, lower = (narrow(x(), half).astype(np.uint32) for x in (high, low))
        target(lower | (upper << np.uint32(16)))

    return action
