"""Short causal depthwise convolution over tokens, in front of q, k or v."""

from linearize.kernels.short_conv.chunk import short_conv_chunk
from linearize.kernels.short_conv.recurrent import short_conv_step
from linearize.kernels.short_conv.reference import short_conv_reference
from linearize.kernels.short_conv.streams import short_conv_step_streams, short_conv_streams

__all__ = [
    "short_conv_chunk",
    "short_conv_reference",
    "short_conv_step",
    "short_conv_step_streams",
    "short_conv_streams",
]
