"""Gated slots: a fixed number of keys and values that forget, read by softmax attention over the slots."""

from linearize.kernels.slots.chunk import slots_chunk
from linearize.kernels.slots.recurrent import slots_step
from linearize.kernels.slots.reference import SlotState, slots_reference

__all__ = ["SlotState", "slots_chunk", "slots_reference", "slots_step"]
