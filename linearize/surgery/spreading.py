"""Models whose passes see a stretch of each sequence, the rest of which other processes hold.

Mixers run in `mixers.spread`'s form. The model's own softmax layers, and the teacher's, get the keys and values of all
processes by an all-gather whose backward pass is a reduce-scatter, and each query sees those of its document up to its
own place in the whole sequence. Positions are the caller's: `position_ids` of the whole sequence, cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from linearize import across
from linearize.across import Across
from linearize.errors import UnsupportedModelError
from linearize.mixers import spread
from linearize.surgery import arguments, rotation
from linearize.surgery.attention import LinearizedAttention
from linearize.surgery.inspection import attention_layers
from linearize.surgery.model import converted

NAME = "linearize_across"
"""Under which the attention function is registered with transformers; no mask function is, so that none is made."""
ROWS = 1024
"""Query rows at once where sequences hold several documents, each block with a mask of its own."""


@contextmanager
def spreading(models: Iterable[nn.Module], processes: Across, *, again: bool = False) -> Iterator[None]:
    """Inside, passes of these models, forward and backward, take this process's part of longer sequences.

    Args:
        models: converted or not, under any wrapper; `refusal` says nothing against them.
        processes: who holds the sequences.
        again: mixers are computed once more in backward, see `mixers.spread`.
    """
    modules = [module for model in models for module in model.modules()]
    configs = {id(config): config for module in modules if (config := _config(module)) is not None}
    switches = {
        id(layer.linearize_switch): layer.linearize_switch for model in models for layer in converted(model)
    }
    with ExitStack() as stack:
        stack.enter_context(across.spread(processes))
        for config in configs.values():
            before = config._attn_implementation_internal
            stack.callback(setattr, config, "_attn_implementation_internal", before)
            config._attn_implementation_internal = NAME
        for switch in switches.values():
            stack.callback(setattr, switch, "spread", switch.spread)
            switch.spread = partial(spread.chunked, processes, again=again)
        yield


def _config(module: nn.Module) -> Any:
    """What names the attention function of a module, or of the teacher where it is converted."""
    config = (
        module.teacher_config if isinstance(module, LinearizedAttention) else getattr(module, "config", None)
    )
    return config if hasattr(config, "_attn_implementation_internal") else None


def refusal(model: Any) -> str | None:
    """Why a model cannot be spread, or None.

    Args:
        model: a causal language model, loaded or on the meta device.

    Raises:
        UnsupportedModelError: its attention cannot be read at all.
    """
    config = model.config.get_text_config()
    other = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if other:
        return f"it has layers of the type {', '.join(other)}"
    for layer in attention_layers(model):
        shape = layer.shape
        for what, number in (
            ("a sliding window", shape.sliding_window),
            ("chunks", shape.chunk),
            ("a soft cap", shape.softcap),
        ):
            if number is not None:
                return f"its softmax has {what} of {number:g}"
    strange = sorted(rotation.kinds(getattr(config, "rope_parameters", None)) - set(rotation.FIXED))
    if strange:
        return f"its rotary embedding ({strange[0]}) depends on the length that a process sees"
    return None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Softmax attention as transformers calls it: q, k, v [B, H, T, K] of this process -> [B, T, H, V].

    Raises:
        UnsupportedModelError: the call asks for more than causal softmax over documents.
    """
    processes = across.active()
    assert processes is not None, "called outside of `spreading`"
    assert query.shape[2] == processes.tokens, "a pass over other tokens than those of the batch"
    why = arguments.refusal(kwargs, tokens=query.shape[2], mask=attention_mask)
    for name in ("softcap", "sliding_window", "s_aux"):
        if why is None and kwargs.get(name) is not None:
            why = f"is called with {name}"
    if why is None and attention_mask is not None:
        why = "is given a mask"
    if why is not None:
        raise UnsupportedModelError(
            f"run.sequence: {type(module).__name__} {why}, which softmax over several processes does not compute: set "
            "run.sequence=1"
        )
    end = processes.begin + processes.tokens
    # under autocast a rotary embedding leaves q and k in float32, which no flash kernel takes beside the values
    query, key = query.to(value.dtype), key.to(value.dtype)
    keys, values = (_repeated(_whole(processes, x)[:, :, :end], query.shape[1]) for x in (key, value))
    if processes.bordered:
        made = _by_documents(processes, query, keys, values, scaling, dropout)
    else:
        mask = causal_lower_right(query.shape[2], end)
        made = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, dropout_p=dropout, scale=scaling
        )
    return made.transpose(1, 2).contiguous(), None


def _whole(processes: Across, x: Tensor) -> Tensor:
    """[B, N, T, K] of all processes."""
    return processes.whole(x.transpose(1, 2)).transpose(1, 2)


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _by_documents(
    processes: Across, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, dropout: float
) -> Tensor:
    """In blocks of query rows, each against the keys of the documents that it is of."""
    begin, docs = processes.begin, processes.docs
    place = torch.arange(docs.shape[1], device=docs.device)

    def block(q: Tensor, k: Tensor, v: Tensor, own: slice, seen: slice) -> Tensor:
        visible = (place[own, None] >= place[seen]) & (docs[:, own, None] == docs[:, None, seen])
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible[:, None], dropout_p=dropout, scale=scaling
        )

    parts = []
    for first in range(0, query.shape[2], ROWS):
        last = min(first + ROWS, query.shape[2])
        own, seen = slice(begin + first, begin + last), slice(processes.first_keys[first], begin + last)
        given = query[:, :, first:last], keys[:, :, seen], values[:, :, seen], own, seen
        # made anew in backward, so that no block's mask outlives it
        graph = torch.is_grad_enabled()
        parts.append(checkpoint(block, *given, use_reentrant=False) if graph else block(*given))
    return torch.cat(parts, 2)


AttentionInterface.register(NAME, attention)
