"""Softmax over everything, in place: over a text of known length it is a window that holds all of it."""

from __future__ import annotations

from typing import Any

from linearize.mixers import Mixer
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


def holds_tokens(model: Any) -> bool:
    """Whether what a layer holds depends on the length of the text: a softmax layer, kept or run by a mixer."""
    layers = converted(model)
    kept = len(layers) < model.config.get_text_config().num_hidden_layers
    return kept or any(isinstance(layer.mixer.window, FullWindow) for layer in layers)
