"""Short causal depthwise convolution over tokens, in front of q, k or v."""

from linearize.kernels.short_conv.chunk import short_conv_chunk
from linearize.kernels.short_conv.recurrent import short_conv_step
from linearize.kernels.short_conv.reference import short_conv_reference

__all__ = ["short_conv_chunk", "short_conv_reference", "short_conv_step"]
