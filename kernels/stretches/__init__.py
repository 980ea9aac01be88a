"""Stretches of the past that double: weights for each, in chunks, and carrying states as a binary counter carries."""

from linearize.kernels.stretches.chunk import Stretches, stretches_chunk, widest
from linearize.kernels.stretches.recurrent import carry, carry_reference
from linearize.kernels.stretches.reference import stretches_reference

__all__ = ["Stretches", "carry", "carry_reference", "stretches_chunk", "stretches_reference", "widest"]
