"""Softmax attention over a window of recent keys, unnormalized: numerator, denominator and row maximum."""

from linearize.kernels.window.chunk import window_chunk
from linearize.kernels.window.reference import softmax_scores, weigh, window_reference

__all__ = ["softmax_scores", "weigh", "window_chunk", "window_reference"]
