"""Softmax over everything, in place: over a text of known length it is a window that holds all of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize.mixers import Mixer, State
from linearize.mixers.window.full import FullWindow
from linearize.mixers.window.sliding import SlidingWindow
from linearize.surgery import converted


def bounded(mixer: Mixer, length: int) -> Mixer:
    """The same function over texts of at most `length` tokens, by a state of fixed size; most mixers are that already.

    Args:
        mixer: of a layer; its parameters are shared.
        length: at least 1 where the mixer's state grows.
    """
    window = mixer.window
    if not isinstance(window, FullWindow):
        return mixer
    ring = SlidingWindow(SlidingWindow.Config(size=length), window.shape)
    ring.log_base = window.log_base
    return Mixer(mixer.shape, mixer.position, ring, mixer.recurrent, mixer.combine, mixer.output)


def hold_window(mixer: Mixer, state: State, tensors: dict[str, Tensor]) -> None:
    """Put what a `full` window holds, [1, S, ...] by name, into the ring of the `bounded` mixer, for every row."""
    ring = mixer.window
    assert isinstance(ring, SlidingWindow)
    held = {}
    for name in ("window_k", "window_v", "window_valid"):
        last = tensors[name][:, -ring.span :]
        empty = last.new_zeros(1, ring.span - last.shape[1], *last.shape[2:])
        held[name] = torch.cat([empty, last], 1).expand(state.batch, ring.span, *last.shape[2:])
    ring.refill(state, held["window_k"], held["window_v"], held["window_valid"])
    for name in set(state) - {*held, "window_next"}:
        state[name].copy_(tensors[name].expand_as(state[name]))


def holds_tokens(model: Any) -> bool:
    """Whether what a layer holds depends on the length of the text: a softmax layer, kept or run by a mixer."""
    layers = converted(model)
    kept = len(layers) < model.config.get_text_config().num_hidden_layers
    return kept or any(isinstance(layer.mixer.window, FullWindow) for layer in layers)
