"""Which attention layers stay softmax: forward-only scores of single layers, and greedy restoring."""

from linearize.select.job import Options, Selection, select

__all__ = ["Options", "Selection", "select"]
