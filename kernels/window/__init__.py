"""Softmax attention over a window of recent keys, unnormalized: numerator, denominator and row maximum."""

from linearize.kernels.window.chunk import window_chunk
from linearize.kernels.window.merge import add_sink, merge
from linearize.kernels.window.reference import softmax_scores, weigh, window_reference
from linearize.kernels.window.seen import NOWHERE, Seen

__all__ = [
    "NOWHERE",
    "Seen",
    "add_sink",
    "merge",
    "softmax_scores",
    "weigh",
    "window_chunk",
    "window_reference",
]
