"""Out of memory: where, how much was asked for, and the command that goes on with less."""

from __future__ import annotations

import errno
import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from linearize.config.schema import EvalConfig, StageConfig
from linearize.errors import LinearizeError
from linearize.memory import machine
from linearize.objectives.whole import TooManyLogitsError

_WORDS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "unable to allocate",
    "cublas_status_alloc_failed",
    "bad_alloc",
)
"""What allocators say that raise a plain RuntimeError, in lower case."""
_KILLED = re.compile(r"dataloader worker .* (killed by signal: (killed|bus error)|exited unexpectedly)", re.S)
_FREE = re.compile(r"total capacity of ([\d.]+) (\w+) of which ([\d.]+) (\w+) is free")
_ASKED = re.compile(r"(?:tried to allocate|allocate)\s+(\d+(?:\.\d*)?)\s*(bytes|[KMGT]i?B)\b", re.IGNORECASE)


MOST, FEW = 32, 4
"""Items at once to begin with, on a GPU and elsewhere."""
TOKENS = 131_072
"""Tokens at once at most: no faster beyond, and a tensor of them has fewer than 2^31 numbers, as kernels may count."""
Found = TypeVar("Found")


class OutOfMemoryError(LinearizeError):
    """Memory ran out; the message says where, how much was asked for and the command that goes on with less."""


@contextmanager
def watched(where: str | Callable[[], str], remedy: Callable[[], str]) -> Iterator[None]:
    """Inside, running out of memory is an `OutOfMemoryError`.

    Args:
        where: what is going on, as "training stage 'transfer'"; asked only when memory has run out.
        remedy: sentences on what to do.

    Raises:
        OutOfMemoryError: in place of what the allocator raised.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, LinearizeError) or not is_out_of_memory(error):
            raise
        place = where if isinstance(where, str) else where()
        if isinstance(error, TooManyLogitsError):
            raise OutOfMemoryError(f"too many logits {place}: {error}. {remedy()}") from error
        figures = ", ".join(figure for figure in (_asked(error), _free(error)) if figure)
        raise OutOfMemoryError(
            f"out of memory {place}{f' ({figures})' if figures else ''}. {remedy()}"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the device or of the machine, has run out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    if isinstance(error, RuntimeError):
        return any(words in text for words in _WORDS) or _KILLED.search(text) is not None
    return "os error 12" in text  # safetensors, in Rust's words


class Fitting:
    """A number of items at once that halves where memory runs out, and stays there.

    Args:
        setting: the number, which then stays; or auto.
        length: tokens of an item.

    Attributes:
        alone: whether this process may begin again by itself; in a sharded model the others compute with it.
    """

    def __init__(self, setting: int | str, length: int = 1) -> None:
        self.most = max(1, TOKENS // length)
        self.size = None if setting == "auto" else int(setting)
        self.found = self.size is None
        self.alone = True

    def run(self, job: Callable[[int], Found], device: torch.device) -> Found:
        """What `job` gives for as many items as fit.

        Raises:
            RuntimeError, MemoryError: what the allocator raised, where not even one fits or the number is given.
        """
        if self.size is None:
            self.size = min(self.most, MOST if device.type == "cuda" and self.alone else FEW)
        while True:
            try:
                return job(self.size)
            except Exception as error:
                if not (self.alone and self.found and self.size > 1 and is_out_of_memory(error)):
                    raise
            self.size //= 2
            release(device)


def release(device: torch.device) -> None:
    """Give back the memory of what is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def less_for_stage(name: str, stage: StageConfig, *, whole_model: bool) -> list[str]:
    """Overrides that keep a stage's steps and need less memory; none where the recipe is at its least.

    Args:
        name: of the stage.
        stage: its settings.
        whole_model: whether gradients go through the whole model, so that checkpointing saves something.
    """
    overrides = [] if stage.micro_batch in ("auto", 1) else [f"stages.{name}.micro_batch=auto"]
    if whole_model and not stage.gradient_checkpointing:
        overrides.append(f"stages.{name}.gradient_checkpointing=true")
    return overrides


def less_for_evaluation(evaluation: EvalConfig) -> list[str]:
    """As `less_for_stage`, of the evaluation."""
    return [] if evaluation.batch_size in ("auto", 1) else ["eval.batch_size=auto"]


def advice(overrides: list[str], otherwise: str, command: str) -> str:
    """The sentences after "out of memory": a command with overrides, or what else there is to do.

    Args:
        overrides: settings that need less and leave the result as it is.
        otherwise: what to shorten, in a new run, where there are none or they are not enough.
        command: goes on with the run, or begins it anew.
    """
    if overrides:
        less = " ".join([command, *overrides])
        return f"The same result with less memory:\n  {less}\nIf that is not enough: {otherwise}"
    return f"What is left to do: {otherwise}. Or free memory and go on with:\n  {command}"


def _asked(error: BaseException) -> str:
    found = _ASKED.search(str(error))
    if found is None:
        return ""
    if found[2].lower() != "bytes":
        return f"{found[1].rstrip('.')} {found[2]} asked for"
    amount = float(found[1])
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            break
        amount /= 1024
    return f"{amount:,.0f} bytes asked for" if unit == "bytes" else f"{amount:,.2f} {unit} asked for"


def _free(error: BaseException) -> str:
    """What is left of how much: of the device as its allocator says, else of the machine."""
    found = _FREE.search(str(error))
    if found is not None:
        return f"{found[3]} {found[4]} of {found[1]} {found[2]} free"
    if isinstance(error, torch.OutOfMemoryError) or "cuda" in str(error).lower():
        return ""
    free, total = machine()
    return "" if not total else f"{free / 2**30:,.2f} of the machine's {total / 2**30:,.2f} GiB free"
