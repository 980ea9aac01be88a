"""Out of memory: where, how much was asked for, and the command that goes on with less."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from linearize.config.schema import EvalConfig, StageConfig
from linearize.errors import LinearizeError

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
_ASKED = re.compile(r"(?:tried to allocate|allocate)\s+(\d+(?:\.\d*)?)\s*(bytes|[KMGT]i?B)\b", re.IGNORECASE)


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
        raise OutOfMemoryError(f"out of memory {place}{_asked(error)}. {remedy()}") from error


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


def less_for_stage(name: str, stage: StageConfig, *, whole_model: bool) -> list[str]:
    """Overrides that keep a stage's steps and need less memory; none where the recipe is at its least.

    Args:
        name: of the stage.
        stage: its settings.
        whole_model: whether gradients go through the whole model, so that checkpointing saves something.
    """
    overrides = []
    if stage.batch_size > 1:
        smaller = next(size for size in range(stage.batch_size // 2, 0, -1) if stage.batch_size % size == 0)
        accumulation = stage.grad_accum * (stage.batch_size // smaller)
        overrides = [f"stages.{name}.batch_size={smaller}", f"stages.{name}.grad_accum={accumulation}"]
    if whole_model and not stage.gradient_checkpointing:
        overrides.append(f"stages.{name}.gradient_checkpointing=true")
    return overrides


def less_for_evaluation(evaluation: EvalConfig) -> list[str]:
    """As `less_for_stage`, of the evaluation."""
    return [f"eval.batch_size={evaluation.batch_size // 2}"] if evaluation.batch_size > 1 else []


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
        return f" ({found[1].rstrip('.')} {found[2]} asked for)"
    amount = float(found[1])
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            break
        amount /= 1024
    return f" ({amount:,.0f} bytes asked for)" if unit == "bytes" else f" ({amount:,.2f} {unit} asked for)"
