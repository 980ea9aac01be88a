"""Which form of an operator runs: Triton on CUDA, torch elsewhere; chosen once, overridable, never silently quadratic.

``LINEARIZE_KERNELS=auto|torch|triton`` is read at the first call. ``auto`` takes Triton for tensors on a CUDA device;
``triton`` insists on it, on the CPU too, where it needs Triton's interpreter (``TRITON_INTERPRET=1``, slow: for tests).
float64, the precision of the references, has a torch form only and always takes it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from linearize.errors import LinearizeError
from linearize.registry import closest

VARIABLE = "LINEARIZE_KERNELS"
CHOICES = ("auto", "torch", "triton")
_forced: str | None = None


class KernelError(LinearizeError):
    """A kernel cannot take these tensors; the message says which rule they break and what to do."""


@cache
def _chosen() -> str:
    value = os.environ.get(VARIABLE, "auto")
    if value not in CHOICES:
        raise KernelError(f"{VARIABLE}='{value}' is not a choice; {closest(value, CHOICES)}")
    return value


# looked for once, here: torch.compile does not trace the search
_FOUND = importlib.util.find_spec("triton") is not None


def has_triton() -> bool:
    """Whether Triton can be imported."""
    return _FOUND


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton(*tensors: Tensor) -> bool:
    """Whether an operator on these tensors runs as a Triton kernel.

    Raises:
        KernelError: Triton was asked for where it cannot run, or `LINEARIZE_KERNELS` has no such value.
    """
    choice = _forced or _chosen()
    if choice == "torch" or any(x.dtype == torch.float64 for x in tensors):
        return False
    on_gpu = all(x.is_cuda for x in tensors)
    if choice == "auto":
        return on_gpu and has_triton()
    if not has_triton():
        raise KernelError(f"{VARIABLE}=triton, but Triton is not installed: pip install 'triton>=3.6'")
    if not on_gpu and not interpreted() and not recording():
        where = next(x.device for x in tensors if not x.is_cuda)
        raise KernelError(
            f"{VARIABLE}=triton, but a tensor is on {where}: move the model to a CUDA device, set {VARIABLE}=auto, or "
            "(slow, for tests) run Triton's interpreter with TRITON_INTERPRET=1"
        )
    return True


def automatic() -> bool:
    """Whether the choice is left to this module, so that what no kernel covers may run in torch without being asked."""
    return (_forced or _chosen()) == "auto"


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    """Override the choice inside a block: ``with kernels("torch"): ...``."""
    global _forced
    if choice not in CHOICES:
        raise KernelError(f"kernels('{choice}'): no such choice; {closest(choice, CHOICES)}")
    before, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = before


def require(operator: str, **rules: tuple[bool, str]) -> None:
    """Refuse what a Triton kernel does not cover.

    Args:
        operator: its name.
        **rules: argument -> (whether it holds, the rule with the value).

    Raises:
        KernelError: with every broken rule, and the remedy.
    """
    broken = [f"{name}: {rule}" for name, (holds, rule) in rules.items() if not holds]
    if broken:
        raise KernelError(
            f"the Triton kernel {operator} does not cover this call: {'; '.join(broken)}. {VARIABLE}=torch runs the "
            "same function in torch, in linear memory but slower"
        )


def recording() -> bool:
    """Whether launches are being recorded instead of made; see `launch.record`."""
    from linearize.kernels import launch

    return launch.records is not None
