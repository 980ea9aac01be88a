"""Which branch carries the model: the same weights measured with parts switched off.

A converted model whose window alone does the work has learned nothing in its linear branch, and its perplexity does
not show that. So beside the model itself stand: the linear branch off, the window off, and mixers never trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from linearize import surgery

Result = TypeVar("Result")

TEACHER = "teacher"
NO_LINEAR = "linear branch off"
NO_WINDOW = "window off"
UNTRAINED = "mixers untrained"


def ablate(model: nn.Module, measure: Callable[[], Result], *, teacher: bool = True) -> dict[str, Result]:
    """Call `measure` once under each ablation, and leave the model as it was.

    Args:
        model: a converted model (`surgery.convert`), or a PeftModel around one.
        measure: measures `model`, for example ``lambda: perplexity(model, tokenizer, texts).value``.
        teacher: also measure the model that it was converted from: every layer back on its original attention, adapters
            off. After adapters were merged this is the original attention over the changed projections.

    Returns:
        label -> what `measure` returned. Labels: "teacher", "linear branch off", "window off", "mixers untrained".
        The two branch labels are left out when no converted layer has both branches: there is nothing to tell apart.
    """
    settings: dict[str, Callable[[], AbstractContextManager[object]]] = {}
    if teacher:
        settings[TEACHER] = lambda: _as_teacher(model)
    if any(layer.mixer.has_both_branches for layer in surgery.converted(model)):
        settings[NO_LINEAR] = lambda: surgery.branch_off(model, "linear")
        settings[NO_WINDOW] = lambda: surgery.branch_off(model, "window")
    settings[UNTRAINED] = lambda: surgery.fresh_mixers(model)
    device = next(model.parameters()).device
    results: dict[str, Result] = {}
    # Fresh mixers draw random numbers: a training that goes on afterwards must not notice.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for label, setting in settings.items():
            with setting():
                results[label] = measure()
    return results


@contextmanager
def _as_teacher(model: Any) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(surgery.mode(model, "teacher"))
        if hasattr(model, "disable_adapter"):
            stack.enter_context(model.disable_adapter())
        yield
