"""The delta rule, plain or gated: what the state holds under a key is replaced, not added to."""

from linearize.kernels.delta.chunk import delta_chunk
from linearize.kernels.delta.recurrent import delta_step
from linearize.kernels.delta.reference import delta_reference

__all__ = ["delta_chunk", "delta_reference", "delta_step"]
