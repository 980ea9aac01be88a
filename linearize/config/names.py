"""Names of mixers that mean the same in every recipe and checkpoint."""

DEFAULT = "default"
"""The mixer that a recipe's `mixer:` describes."""
SOFTMAX = "softmax"
"""In the place of a mixer's name: the layer stays as it is."""
