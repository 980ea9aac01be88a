"""Linear attention with forgetting: the state decays, a head or a dimension at a time, before each key is added."""

from linearize.kernels.gated_linear.chunk import gated_linear_chunk
from linearize.kernels.gated_linear.recurrent import gated_linear_step
from linearize.kernels.gated_linear.reference import Gated, GatedState, gated_linear_reference

__all__ = ["Gated", "GatedState", "gated_linear_chunk", "gated_linear_reference", "gated_linear_step"]
