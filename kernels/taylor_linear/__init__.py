"""Linear attention whose weights are 1 + z + z^2 / 2 of the scaled product z = scale q.k (Based, arXiv 2402.18668)."""

from linearize.kernels.taylor_linear.chunk import taylor_linear_chunk
from linearize.kernels.taylor_linear.recurrent import taylor_linear_step
from linearize.kernels.taylor_linear.reference import taylor_features, taylor_linear_reference

__all__ = ["taylor_features", "taylor_linear_chunk", "taylor_linear_reference", "taylor_linear_step"]
