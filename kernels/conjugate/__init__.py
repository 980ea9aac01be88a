"""Conjugate gradients on many small symmetric systems: of the tokens of a text, and where H is at hand."""

from linearize.kernels.conjugate.chunk import conjugate_chunk, conjugate_step
from linearize.kernels.conjugate.recurrent import conjugate_solve
from linearize.kernels.conjugate.reference import LOWEST, begun, conjugate_reference

__all__ = ["LOWEST", "begun", "conjugate_chunk", "conjugate_reference", "conjugate_solve", "conjugate_step"]
