"""transformers' continuous batching on the flash attention that torch brings, where no package of its own is installed.

Without one it takes `paged|sdpa`, whose mask has a number for every new token and every token of every text; nobody
would serve that way, so that a comparison with it would flatter us.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

NAME = "paged|flash_of_torch"


@contextmanager
def used(model: Any) -> Iterator[None]:
    """Inside, `model.generate_batch` runs on it."""
    AttentionInterface.register(NAME, attention)
    before = model.config._attn_implementation
    # not by set_attn_implementation, which would look for a package of this name
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before


def attention(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    cache: Any,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: Any,
    read_index: Any,
    write_index: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls its own `paged_attention_forward`: q, k, v [1, H, T, K] of all texts in a row."""
    if getattr(module, "sliding_window", None):
        raise ValueError("a layer with a sliding window")
    if isinstance(cu_seq_lens_k, dict):
        cu_seq_lens_k, max_seqlen_k = cu_seq_lens_k["full_attention"], max_seqlen_k["full_attention"]
    keys, values = cache.update(
        key_states=k,
        value_states=v,
        layer_idx=module.layer_idx,
        read_index=read_index,
        write_index=write_index,
    )
    made = varlen(
        q[0].transpose(0, 1).contiguous(),
        keys.contiguous(),
        values.contiguous(),
        cu_seq_lens_q.to(torch.int32),
        cu_seq_lens_k.to(torch.int32).clone(),
        max_seqlen_q,
        max_seqlen_k,
        module.scaling,
    )
    return made, None


def varlen(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, most_q: int, most_k: int, scale: float
) -> Tensor:
    """Causal attention of texts side by side, the last query of each at its last key.

    Args:
        q: [T, H, K].
        k, v: [S, N, K].
        ends_q, ends_k: [B + 1] int32, where texts begin and end.
        most_q, most_k: of the longest.
        scale: of scores.
    """
    if q.device.type == "cuda":
        given = (q, k, v, ends_q, ends_k, most_q, most_k, 0.0, True, False)
        return torch.ops.aten._flash_attention_forward(*given, scale=scale)[0]
    made = torch.empty_like(q)
    for text in range(len(ends_q) - 1):
        own, seen = slice(*ends_q[text : text + 2].tolist()), slice(*ends_k[text : text + 2].tolist())
        late = torch.arange(seen.stop - seen.start) - (seen.stop - seen.start) + (own.stop - own.start)
        mask = late <= torch.arange(own.stop - own.start)[:, None]
        a, b, c = (x.transpose(0, 1)[None] for x in (q[own], k[seen], v[seen]))
        found = torch.nn.functional.scaled_dot_product_attention(a, b, c, mask, scale=scale, enable_gqa=True)
        made[own] = found[0].transpose(0, 1)
    return made
