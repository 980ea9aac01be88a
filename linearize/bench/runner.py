"""Running cases: ours first, self-tuning peers last; whatever stops one is that one's result and stops no other."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from linearize.bench.agreement import disagreement
from linearize.bench.case import Case, Contender, Draw, NotAvailable, Tensors
from linearize.bench.clock import Ceilings, Timing
from linearize.bench.peers import tuning_among

ORDER = {"ours": 0, "peer": 1, "tuned": 2}
LOST = ("illegal memory access", "unspecified launch failure", "misaligned address", "device-side assert")
"""What a CUDA error says after which nothing runs in this process any more."""


class Clock(Protocol):
    """What times calls; `clock.CudaClock`, or something simpler in tests."""

    device: str
    dtype: torch.dtype

    def time(self, call: Callable[[], Any]) -> Timing: ...
    def peak(self, call: Callable[[], Any]) -> float: ...
    def finish(self) -> None: ...
    def release(self) -> None: ...


@dataclass(frozen=True)
class Options:
    """What is run.

    Args:
        peers_at: lengths at which peers that tune themselves are timed; zero or none: not at all.
        warm_up: seconds that one peer's first call, or its first backward, may take.
        budget: seconds after which nothing new is started; None: no limit.
        only_compile: make each call once, which compiles and tunes, and time nothing.
        configurations: most that a peer tunes each of its kernels among; None: all of its own.
    """

    peers_at: tuple[int, ...] = (2048, 8192, 32_768)
    warm_up: float = 240.0
    budget: float | None = None
    only_compile: bool = False
    configurations: int | None = None


@dataclass
class Row:
    """One contender at one case. A time is None where the note says why."""

    case: Case
    contender: Contender
    forward: Timing | None = None
    both: Timing | None = None
    forward_note: str = ""
    both_note: str = ""
    error: float | None = None
    """Of ours, at an operator's first case: see `disagreement`."""
    peak_mib: float | None = None
    """Of forward + backward, beyond the inputs."""
    seconds: float = 0.0
    """That measuring took, tuning included."""
    tuned_among: int | None = None
    """Most configurations of each kernel that a peer tuned itself among, where that was not all of them."""


def run(
    cases: Sequence[Case], clock: Clock, options: Options, done: Callable[[list[Row]], None] | None = None
) -> list[Row]:
    """Time every contender of every case.

    Args:
        cases: in the order of the table.
        clock: what times.
        options: limits.
        done: called with all rows of the table after each measurement, so that what is killed leaves its results.

    Returns:
        Rows in the order of the cases and their contenders.
    """
    started, lost = time.monotonic(), ""
    rows = [Row(case, contender) for case in cases for contender in case.contenders]
    shared: dict[Any, Row] = {}
    checked: set[str] = set()
    for row in sorted(rows, key=lambda row: ORDER[row.contender.kind]):
        reason = lost or _left_out(row, options, time.monotonic() - started)
        if reason:
            row.forward_note = row.both_note = reason
        else:
            with tuning_among(options.configurations):
                _measure(row, clock, options, shared)
            if row.contender.kind == "tuned":
                row.tuned_among = options.configurations
            timed = row.contender.kind == "ours" and (row.forward or row.both)
            if timed and row.case.operator not in checked:
                checked.add(row.case.operator)
                _check(row, clock)
            lost = _lost(row)
        if done is not None:
            done(rows)
    return rows


def _left_out(row: Row, options: Options, spent: float) -> str:
    if options.budget is not None and spent > options.budget:
        return f"not run: the budget of {options.budget:g} s is spent"
    asked = any(options.peers_at) and (not row.case.swept or row.case.length in options.peers_at)
    if row.contender.kind == "tuned" and not asked:
        return "not timed at this length (--peers-at)"
    return ""


def _lost(row: Row) -> str:
    for note in (row.forward_note, row.both_note):
        if any(sign in note for sign in LOST):
            return f"not run: {row.contender.name} on {row.case.operator} left the device unusable for this process"
    return ""


def _measure(row: Row, clock: Clock, options: Options, shared: dict[Any, Row]) -> None:
    """Fill the row: forward without gradients, then forward and backward."""
    began = time.monotonic()
    contender, cap = row.contender, options.warm_up if row.contender.kind == "tuned" else None
    inputs: Tensors = {}
    with _reported() as note:
        inputs = row.case.inputs(Draw(clock.device, clock.dtype))
        inputs = contender.layout(inputs) if contender.layout else inputs
    key = contender.name, tuple((name, tuple(x.shape)) for name, x in inputs.items())
    if not note and contender.shared and key in shared:
        known = shared[key]
        row.forward, row.both, row.peak_mib = known.forward, known.both, known.peak_mib
        row.forward_note, row.both_note = known.forward_note, known.both_note
        return
    if not note:
        with _reported() as note, torch.no_grad():
            with limit(cap):
                call = contender.build(inputs)
                call()
                clock.finish()
            row.forward = None if options.only_compile else clock.time(call)
    row.forward_note = row.both_note = note[0] if note else ""
    if not note and contender.backward:
        with _reported() as note:
            step = both_ways(contender, inputs, row.case.trained)
            # In one thread, so that the limit can stop a backward that tunes.
            with limit(cap), torch.autograd.set_multithreading_enabled(cap is None):
                step()
                clock.finish()
            if not options.only_compile:
                row.both, row.peak_mib = clock.time(step), clock.peak(step)
        row.both_note = note[0] if note else ""
    elif not note:
        row.both_note = "no backward"
    shared[key] = row
    inputs.clear()
    with _reported():
        clock.release()
    row.seconds = time.monotonic() - began
    if options.only_compile:
        row.forward_note = row.forward_note or f"compiled in {row.seconds:.0f} s"


def _check(row: Row, clock: Clock) -> None:
    with _reported() as note:
        row.error = disagreement(row.case, row.contender, Draw(clock.device, clock.dtype, seed=1))
    if note:
        row.forward_note = row.forward_note or f"not checked: {note[0]}"
    clock.release()


def both_ways(contender: Contender, inputs: Tensors, trained: Sequence[str]) -> Callable[[], Any]:
    """A call that runs forward and backward against random gradients of the outputs."""
    used = {name: x.detach().requires_grad_(name in trained) for name, x in inputs.items()}
    leaves = [used[name] for name in trained if name in used]
    call = contender.build(used)
    first = call()
    outputs = [first] if isinstance(first, Tensor) else list(first)
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    gradients = [
        torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.float32).to(x.dtype)
        for x in outputs
    ]
    del first, outputs

    def step() -> Any:
        found = call()
        found = [found] if isinstance(found, Tensor) else list(found)
        return torch.autograd.grad(found, leaves, gradients, allow_unused=True)

    return step


@contextmanager
def _reported() -> Iterator[list[str]]:
    """Whatever is raised inside becomes one line in the list that is handed out; Ctrl-C goes through."""
    notes: list[str] = []
    try:
        yield notes
    except NotAvailable as error:
        notes.append(f"not available: {_line(error)}")
    except torch.OutOfMemoryError as error:
        notes.append(f"out of memory: {_line(error)}")
    except TimeLimit as error:
        notes.append(f"stopped: {_line(error)}")
    except Exception as error:
        notes.append(f"refused: {type(error).__name__}: {_line(error)}")


def _line(error: BaseException, length: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else text[: length - 3] + "..."


class TimeLimit(Exception):
    """A first call took too long."""


@contextmanager
def limit(seconds: float | None) -> Iterator[None]:
    """Stop what runs inside after that many seconds, at the next Python instruction; in the main thread only."""
    if (
        seconds is None
        or threading.current_thread() is not threading.main_thread()
        or not hasattr(signal, "SIGALRM")
    ):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeLimit(f"the first call was not done after {seconds:g} s (--warm-up)")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def floors(row: Row, ceilings: Ceilings) -> tuple[tuple[float, str], tuple[float, str]]:
    """Forward's and forward + backward's floor of a row's case: milliseconds, and what sets it."""
    case = row.case
    forward, both = (ceilings.floor(case.bytes[index], case.flops[index]) for index in (0, 1))
    return forward, both
