"""Window softmax and learned linear attention under one normalizer: what a LoLCATs layer computes."""

from linearize.kernels.window_linear.chunk import window_linear
from linearize.kernels.window_linear.reference import Layer, Pins, Weights, window_linear_reference

__all__ = ["Layer", "Pins", "Weights", "window_linear", "window_linear_reference"]
