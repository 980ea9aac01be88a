"""Decoding: a cache of fixed size, one captured step that every token replays, and when transformers is to do it."""

from linearize.decode.engine import Decoder
from linearize.decode.sampling import Sampling

__all__ = ["Decoder", "Sampling"]
