"""One boundary between a library that reads foreign files and the user: whatever it raises becomes one message.

Loaders raise what their code happens to hit on a damaged file: RuntimeError, KeyError, ZeroDivisionError, validation
errors of their own, a panic of their Rust half. None of it names the file or what to do. Inside the boundary stands
one call of the library and nothing of ours, and what our own code raises below that call stays a traceback.
"""

from __future__ import annotations

import re
from types import TracebackType

from jinja2 import TemplateError

from linearize.errors import CheckpointError, LinearizeError

LIBRARIES = frozenset(
    {
        "accelerate",
        "datasets",
        "gguf",
        "huggingface_hub",
        "jinja2",
        "lm_eval",
        "peft",
        "safetensors",
        "tokenizers",
        "transformers",
    }
)
LENGTH = 300
"""Characters of a reason that are shown; some libraries list every class that they know."""
SPEAKS = (ValueError, OSError, RuntimeError, TemplateError)
"""Errors whose text is a sentence; of any other the name is half of what is to be said."""
UNSAFE_ADVICE = re.compile(r"trust_remote_code|weights_only|allow_all_kernels|custom code", re.IGNORECASE)
MEMORY = re.compile(r"out of memory|not enough memory|can(no|')t allocate|unable to allocate", re.IGNORECASE)


class boundary:
    """Context manager: what the library inside raises becomes "`subject` `verb`: reason; `remedy`".

    Errors of this package pass through. So does any other error that this package's own code caused below the library's
    call: it is a bug, and shows its traceback.

    Args:
        subject: the file or what is read from it ("the tokenizer in runs/a").
        remedy: what the user can do.
        verb: what could not be done.
        kind: the error raised.

    Raises:
        LinearizeError: of class `kind`, with the library's error as its cause.
    """

    def __init__(
        self,
        subject: str,
        remedy: str,
        *,
        verb: str = "cannot be loaded",
        kind: type[LinearizeError] = CheckpointError,
    ) -> None:
        self.subject, self.remedy, self.verb, self.kind = subject, remedy, verb, kind

    def __enter__(self) -> boundary:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, LinearizeError):
            return
        # a panic of tokenizers' or safetensors' Rust half is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            return
        if _no_memory(error):
            raise self.kind(
                f"{self.subject} {self.verb}: it needs more memory than there is; free some, or take a smaller model"
            ) from error
        if _ours(trace):
            return
        raise self.kind(f"{self.subject} {self.verb}: {reason(error)}; {self.remedy}") from error


def reason(error: BaseException) -> str:
    """What an error of a library says, as one line without its advice to run foreign code."""
    lines = [re.sub(r"\s+", " ", line).strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line]
    safe = [line for line in lines if not UNSAFE_ADVICE.search(line)]
    if lines and not safe:
        return "it brings code of its own, which is never run"
    text = safe[0] if safe else ""
    whole = isinstance(error, SPEAKS) and not isinstance(error, RecursionError)
    if text.endswith(":") and len(safe) > 1:  # a validator that names itself first and then what it found
        text, whole = re.sub(r"^\w+(Error|Exception): ", "", safe[1]), True
    text = "".join(sign if sign.isprintable() else "?" for sign in text).rstrip(".;: ")
    if len(text) > LENGTH:
        text = text[:LENGTH].rstrip() + " ..."
    name = type(error).__name__
    if not text:
        return name
    return text if whole else f"{name}: {text}"


def _no_memory(error: BaseException) -> bool:
    # torch's CPU allocator raises a plain RuntimeError
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and bool(MEMORY.search(str(error)))
    )


def _ours(trace: TracebackType | None) -> bool:
    """Whether the code that failed, or that called into torch or Python what failed, is this package's own."""
    ours = False
    step = trace.tb_next if trace is not None else None  # the first frame holds the `with`
    while step is not None:
        root = str(step.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if root == "linearize":
            ours = True
        elif root in LIBRARIES:
            ours = False
        step = step.tb_next
    return ours
