"""Linear attention with the additive update, unnormalized: numerator, denominator (running sum of keys), state."""

from linearize.kernels.linear.chunk import linear_chunk
from linearize.kernels.linear.recurrent import linear_read
from linearize.kernels.linear.reference import linear_reference

__all__ = ["linear_chunk", "linear_read", "linear_reference"]
