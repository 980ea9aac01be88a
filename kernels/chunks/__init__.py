"""What the chunked operators share: cutting sequences with documents, decays inside chunks, states between chunks."""

from linearize.kernels.chunks.blocks import Blocks, cut_documents, scan
from linearize.kernels.chunks.decay import Decay
from linearize.kernels.chunks.pairs import decayed_products, decayed_values

__all__ = ["Blocks", "Decay", "cut_documents", "decayed_products", "decayed_values", "scan"]
