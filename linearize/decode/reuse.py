"""Decoders that are kept for the next call: capturing a graph takes longer than a short answer."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from linearize.decode.bounded import holds_tokens
from linearize.decode.choice import Request, fingerprint
from linearize.decode.engine import Decoder

KEPT = 4
"""Decoders kept for one model; each holds the states of its batch."""
STEP = 256
"""Lengths of softmax layers' buffers are multiples of this."""
_NAME = "_linearize_decoders"


class Decoders(OrderedDict):
    """The decoders of one model, the latest last. A copy of the model, or a file of it, has none."""

    fingerprint: tuple[Any, ...] = ()

    def __deepcopy__(self, memo: Any) -> Decoders:
        return Decoders()

    def __reduce__(self) -> Any:
        return Decoders, ()


def decoder(
    model: Any,
    batch: int,
    prompt: int,
    asked: Request,
    *,
    compile: dict[str, Any] | None = None,  # noqa: A002
) -> Decoder:
    """A decoder for a request, a kept one if there is one that fits and the model has not changed since.

    Args:
        model: see `Decoder`.
        batch, prompt: rows and columns of the prompts.
        asked: what to make.
        compile: see `Decoder`.
    """
    kept = vars(model).setdefault(_NAME, Decoders())
    now = fingerprint(model)
    if kept.fingerprint != now:
        kept.clear()
        kept.fingerprint = now
    length = 0
    if holds_tokens(model):
        length = -(-(prompt + asked.tokens) // STEP) * STEP
    options = (
        None if compile is None else tuple(sorted((name, str(value)) for name, value in compile.items()))
    )
    key = (batch, asked.sampling, asked.eos, asked.pad, length, options)
    if key not in kept:
        kept[key] = Decoder(
            model, batch, asked.sampling, eos=asked.eos, pad=asked.pad, length=length, compile=compile
        )
    kept.move_to_end(key)
    while len(kept) > KEPT:
        kept.popitem(last=False)
    return kept[key]


def forget(model: Any) -> None:
    """Drop a model's decoders and the memory that they hold."""
    vars(model).pop(_NAME, None)
