"""The generalized delta rule of RWKV-7: decay by dimension, and one direction of the state moved into another."""

from linearize.kernels.generalized_delta.chunk import generalized_delta_chunk
from linearize.kernels.generalized_delta.recurrent import generalized_delta_step
from linearize.kernels.generalized_delta.reference import generalized_delta_reference

__all__ = ["generalized_delta_chunk", "generalized_delta_reference", "generalized_delta_step"]
