"""What a mixer needs of transformers' attention masks: which tokens are padding, and where packed documents begin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize.errors import UnsupportedModelError


def read_mask(mask: Any, batch: int, tokens: int, offset: int) -> tuple[Tensor | None, Tensor | None]:
    """Padding and document starts of the new tokens, read off the mask that the softmax layer would use.

    The mask is the ground truth for both: transformers builds it from `attention_mask` and, for packed sequences,
    from `position_ids`, and the teacher obeys it.

    Args:
        mask: None, [B, 1, Q, S] bool (true = visible) or float (0 = visible), or [B, S] (flash attention).
        batch, tokens: B and Q.
        offset: column of the first new token.

    Returns:
        valid [B, Q] bool or None (no padding), starts [B, Q] bool or None (one document).

    Raises:
        UnsupportedModelError: a flex-attention BlockMask, whose entries cannot be read.
    """
    if mask is None or tokens == 1:
        # a single new token is never padding: generate feeds real or finished rows
        return None, None
    if not isinstance(mask, Tensor):
        raise UnsupportedModelError(
            f"attention masks of type {type(mask).__name__} (flex attention) cannot be read by converted layers; "
            "use model.set_attn_implementation('sdpa')"
        )
    if mask.dim() == 2:
        return mask[:, -tokens:].to(torch.bool).expand(batch, -1), None
    visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
    valid = visible.diagonal(offset=offset, dim1=-2, dim2=-1).expand(batch, -1)
    sees_previous = visible[:, 1:].diagonal(offset=offset, dim1=-2, dim2=-1).expand(batch, -1)
    starts = torch.zeros_like(valid)
    # an invalid neighbor is padding, not the end of a document
    starts[:, 1:] = valid[:, 1:] & valid[:, :-1] & ~sees_previous
    return valid, starts
