"""What the chunked operators share: cutting sequences with documents, decays inside chunks, states between chunks."""

from linearize.kernels.chunks.blocks import Blocks, cut_documents, scan
from linearize.kernels.chunks.decay import Decay
from linearize.kernels.chunks.pairs import decayed_products, decayed_values
from linearize.kernels.chunks.precision import at_least_float32

__all__ = [
    "Blocks",
    "Decay",
    "at_least_float32",
    "cut_documents",
    "decayed_products",
    "decayed_values",
    "scan",
]
