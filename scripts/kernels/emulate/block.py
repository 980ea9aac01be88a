"""One block behind the other: which instruction comes next, for which threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from emulate import arithmetic, conversion, movement, warps
from emulate.faults import Faults, UnknownInstruction
from emulate.formats import Array
from emulate.memory import GlobalMemory
from emulate.program import Instruction, Program
from emulate.threads import Action, Source, Threads

Builder = Callable[[Instruction, Threads], Action]
ARITHMETIC = {*arithmetic.EXACT, *arithmetic.WIDE, *arithmetic.INTEGER, "rem"}
BUILDERS: dict[str, Builder] = {
    **dict.fromkeys(ARITHMETIC, arithmetic.build_arithmetic),
    "shl": arithmetic.build_shift,
    "shr": arithmetic.build_shift,
    "shf": arithmetic.build_funnel_shift,
    "bfe": arithmetic.build_bits,
    "bfi": arithmetic.build_bits,
    "lop3": arithmetic.build_logic,
    "prmt": arithmetic.build_permute,
    "popc": arithmetic.build_count,
    "setp": conversion.build_compare,
    "selp": conversion.build_select,
    "cvt": conversion.build_convert,
    "mov": movement.build_move,
    "ld": movement.build_load,
    "st": movement.build_store,
    "cp": movement.build_copy,
    "mma": warps.build_product,
    "ldmatrix": warps.build_load_matrix,
    "stmatrix": warps.build_store_matrix,
    "shfl": warps.build_shuffle,
    "redux": warps.build_reduction,
}
"""Operation -> what makes a function of an instruction."""
BARRIERS = ("bar.sync 0", "barrier.sync 0", "barrier.sync.aligned 0")
WITHIN_A_WARP = ("bar.warp.sync", "membar.cta")
"""Nothing to do: a warp's threads run together here."""


@dataclass(frozen=True)
class Step:
    """An instruction, ready to run."""

    text: str
    action: Action | None = None
    branch: int | None = None
    """Where threads go on, if it is a branch."""
    returns: bool = False
    guard: Source | None = None

    @property
    def is_barrier(self) -> bool:
        """Whether all threads wait for each other here."""
        return self.action is None and self.branch is None and not self.returns


def prepare(program: Program, instruction: Instruction, threads: Threads) -> Step:
    """Make a function of one instruction.

    Raises:
        UnknownInstruction: it, or what it is of, is not modelled.
    """
    text, guard = instruction.text, None
    if instruction.guard:
        guard = threads.source(instruction.guard, "pred")
    if instruction.operation == "bra":
        if set(instruction.name.split(".")[1:]) - {"uni"} or instruction.operands[0] not in program.labels:
            raise UnknownInstruction(text)
        return Step(text, branch=program.labels[instruction.operands[0]], guard=guard)
    if instruction.name in ("ret", "exit"):
        return Step(text, returns=True, guard=guard)
    if instruction.operation in ("bar", "barrier", "membar"):
        if instruction.name in WITHIN_A_WARP:
            return Step(text, lambda: None)
        if text not in BARRIERS:
            raise UnknownInstruction(text, "this barrier")
        return Step(text)
    if instruction.operation not in BUILDERS:
        raise UnknownInstruction(text)
    try:
        return Step(text, BUILDERS[instruction.operation](instruction, threads), guard=guard)
    except (KeyError, ValueError, IndexError) as error:  # operands or types that its builder has no place for
        raise UnknownInstruction(text, f"its form ({error})") from error


def prepare_all(program: Program, threads: Threads) -> list[Step]:
    """Make functions of all instructions, so that nothing runs where one is not known.

    Raises:
        UnknownInstruction: the first that is not modelled, with the names of the others.
    """
    steps, unknown = [], []
    for instruction in program.instructions:
        try:
            steps.append(prepare(program, instruction, threads))
        except UnknownInstruction as error:
            unknown.append((instruction.name, error))
    if unknown:
        own, first = unknown[0]
        others = sorted({name for name, _ in unknown} - {own})
        raise UnknownInstruction(first.text, first.why, others) from first
    return steps


def run(
    program: Program,
    count: int,
    arguments: dict[str, Array],
    grid: tuple[int, ...],
    memory: GlobalMemory,
    shared: int,
) -> Faults:
    """Run a launch, block by block.

    Args:
        program: the kernel.
        count: threads of a block.
        arguments: parameter -> its value, a numpy number of its type.
        grid: three sizes.
        memory: the device's, which is written to.
        shared: bytes of shared memory a block.

    Returns:
        What was wrong with the kernel.

    Raises:
        UnknownInstruction: an instruction anywhere in the kernel is not modelled.
    """
    threads = Threads(program, count, arguments, grid, memory, shared)
    steps = prepare_all(program, threads)
    with np.errstate(all="ignore"):
        for place in np.ndindex(*reversed(grid)):
            threads.begin(tuple(reversed(place)))
            _run_block(steps, threads)
    return threads.faults


def _run_block(steps: list[Step], threads: Threads) -> None:
    """Of threads that went apart those that are furthest behind go first, and join others where these are."""
    groups: dict[int, Array] = {0: threads.everyone}
    alive = threads.everyone

    def join(at: int, mask: Array) -> None:
        if mask.any():
            groups[at] = groups[at] | mask if at in groups else mask

    while groups:
        at = min(groups)
        mask = groups.pop(at)
        while True:
            if groups and at >= min(groups):  # where others wait, or behind them
                join(at, mask)
                break
            step, threads.mask = steps[at], mask
            at += 1
            if step.branch is None and not step.returns:
                if step.is_barrier:
                    _barrier(step, threads, alive)
                else:
                    _act(step, threads)
                continue
            leaving = mask if step.guard is None else mask & step.guard()
            staying = mask & ~leaving
            if step.returns:
                alive = alive & ~leaving
            elif staying.any() and leaving.any():
                join(step.branch if step.branch is not None else at, leaving)
                join(at, staying)
                break
            elif leaving.any():
                at, staying = step.branch if step.branch is not None else at, leaving
            if not staying.any():
                break
            mask = staying


def _act(step: Step, threads: Threads) -> None:
    assert step.action is not None
    if step.guard is None:
        step.action()
        return
    whole = threads.mask
    threads.mask = whole & step.guard()
    if threads.mask.any():
        step.action()
    threads.mask = whole


def _barrier(step: Step, threads: Threads, alive: Array) -> None:
    if (threads.mask != alive).any():
        threads.report("a barrier that some threads do not reach", step.text)
    threads.global_memory.barriers += 1
    threads.shared_memory.barriers += 1
