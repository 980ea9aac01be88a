"""Decoding: a cache of fixed size, one captured step that every token replays, and states kept of texts."""

from linearize.decode.draft import Draft
from linearize.decode.engine import Decoder
from linearize.decode.prefix import Prefix, read_ids, state_of
from linearize.decode.prefix_file import load_state, save_state
from linearize.decode.sampling import Sampling

__all__ = ["Decoder", "Draft", "Prefix", "Sampling", "load_state", "read_ids", "save_state", "state_of"]
