"""Losses over the vocabulary from final hidden states, a slice of tokens at once: no tensor of all tokens' logits."""

from linearize.kernels.distill.chunk import distill_loss, slice_tokens, target_log_probs
from linearize.kernels.distill.reference import Head, distill_reference

__all__ = ["Head", "distill_loss", "distill_reference", "slice_tokens", "target_log_probs"]
