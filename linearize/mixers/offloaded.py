"""Weights that accelerate keeps on the disk or in another memory, fetched for the length of one call.

Its hooks fetch the weights of a module around that module's `forward`. The parts of a mixer have several forms, and
some are read by others (one kernel takes the weights of four), so the mixer as a whole runs their hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import nn

HOOK = "_hf_hook"
"""Where accelerate hangs a module's hook."""


class _Done:
    """Stands in for a hook whose work is done already, when a part's own `forward` is called inside."""

    no_grad = False

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output


def present(module: nn.Module) -> AbstractContextManager[None]:
    """Inside, every parameter under `module` is on the device where its hook computes."""
    if torch.compiler.is_compiling():  # accelerate's hooks cannot be traced either
        return nullcontext()
    hooked = [(part, part.__dict__[HOOK]) for part in module.modules() if HOOK in part.__dict__]
    return _fetched(hooked) if hooked else nullcontext()


@contextmanager
def _fetched(hooked: list[tuple[nn.Module, Any]]) -> Iterator[None]:
    entered = []
    try:
        for part, hook in hooked:
            entered.append((part, hook))
            hook.pre_forward(part)
            part.__dict__[HOOK] = _Done()
        yield
    finally:
        for part, hook in entered:
            part.__dict__[HOOK] = hook
            hook.post_forward(part, None)


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: what the first of its hooks says, else where its first parameter is."""
    for part in module.modules():
        hook = part.__dict__.get(HOOK)
        for single in getattr(hook, "hooks", (hook,)):
            device = getattr(single, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next(module.parameters()).device


def with_weights(form: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a method of a module that reads the parameters of its parts."""

    @wraps(form)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with present(self):
            return form(self, *args, **kwargs)

    return call
