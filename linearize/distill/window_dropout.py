"""Window dropout: now and then the recurrent branch has to give the whole output by itself.

Next to a window that already gives most of the output, transfer leaves the recurrent branch what is left over, and
it stays nearly idle (the audit of arXiv 2510.05901: without the linear branch LoLCATs scores as before). With the
window off for a draw, the loss compares the recurrent branch alone with the teacher's full output.

A branch that sees only what has left the window sees nothing at the start of a document; queries there have no loss
in that draw. To a query that sees something, the target is still the full output: the branch cannot know the window's
keys, and learns the best that older ones allow. With `window.overlap: true` it sees every key.

In stages of the whole model the drawn layers run without their window in that step (scheduled sliding-window dropout,
arXiv 2510.05901), which needs that overlap: no loss there can leave out a query of one layer. How often may change
over a stage: much at first, when the window would do all the work, and less later.

A recorded or compiled step runs no Python that could leave a window out. There the draw is a tensor on the device
(`Draw.put_into`): each layer computes both branches and takes its output, and with it the gradient, from the one or the
other (`Mixer.without_window`), which gives what the step without the window gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from linearize.distill.device import sent
from linearize.errors import RecipeError
from linearize.mixers.base import accumulator, documents, narrows
from linearize.mixers.padding import packing

Off: TypeAlias = bool | Tensor
"""Whether a layer's window is off, or a [] bool tensor that says so on the device."""
DRAWN = "windows_off"
"""Name of a draw among the tensors of a batch."""


def check(layers: Iterable[Any]) -> list[bool]:
    """Which converted layers can have their window off: those in which something is learned without it.

    Raises:
        RecipeError: none can; a mixer has one branch, or no parameters in its recurrent branch.
    """
    mixers = [layer.mixer for layer in layers]
    learns = able(mixers)
    if not any(learns):
        both = any(mixer.has_both_branches for mixer in mixers)
        what = "no parameters in its recurrent branch" if both else "one branch alone"
        raise RecipeError(
            [
                f"window_dropout: the mixer has {what}, so nothing trains without the window; remove window_dropout"
            ]
        )
    return learns


def able(mixers: Iterable[Any]) -> list[bool]:
    """Whether something is learned in each without its window."""
    return [mixer.has_both_branches and any(True for _ in mixer.recurrent.parameters()) for mixer in mixers]


def draws(rate: float, layers: int, seed: int, step: int) -> list[bool]:
    """Which layers have their window off: a function of its arguments, so that a resumed run draws the same.

    Layers that cannot (`check`) are drawn for too, so that the others' draws do not depend on them.
    """
    return (np.random.default_rng([seed, step, 0]).random(layers) < rate).tolist()


@dataclass(frozen=True)
class Draw:
    """Which layers have their window off in a step.

    Attributes:
        off: of each converted layer, or [] where none ever has.
        able: which can.
        sure: every step hereabouts draws the same, at a rate of zero or one.
    """

    off: Sequence[bool] = ()
    able: Sequence[bool] = ()
    sure: bool = True

    def put_into(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with the draw beside it, on its device; nobody waits for the copy."""
        return {**batch, DRAWN: sent(torch.tensor(self.off), batch["input_ids"].device)}

    def taken_from(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Off]]:
        """The batch without what `put_into` has put there, and what `windows_off` and `window_off` take."""
        drawn = batch[DRAWN].unbind()
        rest = {name: x for name, x in batch.items() if name != DRAWN}
        return rest, [flag if able else False for flag, able in zip(drawn, self.able, strict=True)]


def forget(layers: Iterable[Any], off: Sequence[bool]) -> None:
    """Drop the gradients of what only a window that is off, and the rule that joins the branches, have learned.

    On the device they are zeros, by which an optimizer with a momentum would move them on; a step that runs without
    the window has none.
    """
    for layer, is_off in zip(layers, off, strict=True):
        if is_off:
            for part in (layer.mixer.window, layer.mixer.combine):
                for parameter in part.parameters():
                    parameter.grad = None


@contextmanager
def _switched(mixer: Any, off: Off) -> Iterator[None]:
    """Inside, a mixer runs without its window, or as the device says."""
    try:
        if isinstance(off, Tensor):
            mixer.without_window = off
        elif off:
            mixer.branch_off = "window"
        yield
    finally:
        mixer.branch_off = mixer.without_window = None


@contextmanager
def windows_off(layers: Iterable[Any], off: Sequence[Off]) -> Iterator[None]:
    """Inside, drawn layers run without their window, forward and backward.

    Args:
        layers: converted ones with both branches.
        off: whether each is drawn.
    """
    with ExitStack() as stack:
        for layer, is_off in zip(layers, off, strict=True):
            stack.enter_context(_switched(layer.mixer, is_off))
        yield


@contextmanager
def window_off(call: Any, off: Off = True) -> Iterator[Any]:
    """Inside, a call whose student is the recurrent branch alone, and whose `valid` leaves out what sees nothing.

    Args:
        call: `surgery.LayerCall` of a mixer with both branches.
        off: false is the call as it is; a [] bool tensor says so on the device.
    """
    if off is False:
        yield call
        return
    valid = call.valid
    if not getattr(call.mixer.window, "overlap", False):  # else every query sees at least its own key
        seen = sees_without_window(call)
        seen = seen | ~off if isinstance(off, Tensor) else seen
        valid = seen if valid is None else seen & valid
    with _switched(call.mixer, off):
        yield _OwnValid(call, valid)


def sees_without_window(call: Any) -> Tensor:
    """[B, T] bool: queries to which the window has handed on at least one key of their document."""
    batch, tokens = call.k.shape[:2]
    mixer, device = call.mixer, call.k.device
    docs = documents(call.starts, batch, tokens, device)
    valid = torch.ones_like(docs, dtype=torch.bool) if call.valid is None else call.valid
    dtype = call.v.dtype if narrows(call.q, call.k, call.v) else accumulator(call.v.dtype)
    q, k, v = (x.to(dtype) for x in (call.q, call.k, call.v))
    packed = None if call.valid is None else packing(valid)
    if packed is not None:
        valid, docs = packed.pack(valid), packed.pack(torch.where(valid, docs, 0))
        q, k, v = packed.pack(q), packed.pack(k), packed.pack(v)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        _, handed = mixer.window.chunked(q, k, v, valid, docs, mixer.initial_state(batch, k.dtype, device))
    added, order = handed.valid, handed.order
    if order is not None:
        added, docs = order.place_keys(added), order.docs
    place = torch.arange(docs.shape[1], device=device)
    last = (
        torch.where(added, place, -1).cummax(1).values
    )  # documents follow each other: the newest key decides
    seen = (last >= 0) & (docs.gather(1, last.clamp_min(0)) == docs)
    seen = seen if order is None else seen.gather(1, order.queries)
    return seen if packed is None else packed.unpack(seen)


class _OwnValid:
    """A layer call, but for the positions that count in the loss; `whole` is the call itself."""

    def __init__(self, call: Any, valid: Tensor) -> None:
        self.whole = call
        self.valid = valid

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)
