"""Decoding: a cache of fixed size, an engine that replays one captured step, and the choice between it and transformers."""

from linearize.decode.engine import Decoder
from linearize.decode.sampling import Sampling

__all__ = ["Decoder", "Sampling"]
