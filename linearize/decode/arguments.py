"""How a model is called: names of its forward's arguments, and the mode that it is in."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def forward_names(model: Any) -> set[str]:
    """Names of the arguments of a model's forward."""
    return set(inspect.signature(model.forward).parameters)


def cache_name(model: Any) -> str:
    """Under which a model takes its cache; the second name is that of transformers before 5.24."""
    return "cache" if "cache" in forward_names(model) else "past_key_values"


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Inside, the model is in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
