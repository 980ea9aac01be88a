"""The delta rule, plain or gated: what the state holds under a key is replaced, not added to."""

from linearize.kernels.gated_delta.chunk import delta_chunk
from linearize.kernels.gated_delta.recurrent import delta_step
from linearize.kernels.gated_delta.reference import delta_reference

__all__ = ["delta_chunk", "delta_reference", "delta_step"]
