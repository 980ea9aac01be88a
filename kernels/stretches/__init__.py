"""States of stretches of the past that double: carrying what is full into the next, as a binary counter carries."""

from linearize.kernels.stretches.recurrent import carry, carry_reference

__all__ = ["carry", "carry_reference"]
