"""What the chunked operators share: cutting sequences with documents, decays inside chunks, states between chunks."""

from linearize.kernels.chunks.blocks import Blocks, cut_documents, scan
from linearize.kernels.chunks.decay import Decay, decayed_products, decayed_values, head_decays, make_decay

__all__ = [
    "Blocks",
    "Decay",
    "cut_documents",
    "decayed_products",
    "decayed_values",
    "head_decays",
    "make_decay",
    "scan",
]
