"""Perplexity of a causal language model on any text, over non-overlapping windows.

The documents are tokenized one by one, joined in order with nothing between them, and cut into windows of equal length.
Inside a window every token but the first is scored, given the window's earlier tokens; the last, partial window is
dropped. So the number depends on the window: compare only numbers of one window.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.data import Document
from linearize.data.tokens import Tokens
from linearize.decode.limits import learned_positions
from linearize.errors import DataError, NotFiniteError
from linearize.mixers.offloaded import device_of
from linearize.objectives.whole import sequences_at_once, whole_logits

LOGITS_AT_ONCE = 2**24
"""Elements of the float32 copy of the logits that exist at a time (64 MB): 341 rows of a 49k vocabulary."""


@dataclass(frozen=True)
class Perplexity:
    """What `perplexity` measured."""

    value: float
    """exp(nll); inf where that overflows a float64."""
    nll: float
    """Mean negative log-likelihood of a scored token, in nats."""
    tokens: int
    """Scored tokens."""
    windows: int
    """Windows that they came from."""

    def __float__(self) -> float:
        return self.value

    def to_dict(self) -> dict[str, float | int]:
        """The four numbers as plain JSON values."""
        return asdict(self)


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    texts: str | Iterable[str | Document] | Tensor,
    *,
    window: int = 1024,
    max_windows: int | None = None,
    batch_size: int = 8,
    meter: Any = None,
    autocast: torch.dtype | None = None,
) -> Perplexity:
    """Perplexity of `texts` under `model`.

    The model is put in evaluation mode for the call and given back as it was. Log-probabilities are float32 (float64
    for a float64 model) and summed in float64. Memory: the model's own logits, batch_size * window * vocabulary in its
    dtype, plus a fixed 64 MB; lower `batch_size` for a large vocabulary.

    Args:
        model: a causal language model of transformers, or a PeftModel around one.
        tokenizer: its tokenizer; unused when `texts` are token windows already.
        texts: one text, several, or what `windows` returned, int64 [N, window] (cut once, measure many models).
        window: tokens in a window, at least 2. Ignored for token windows.
        max_windows: use at most this many windows from the start; None or 0 takes all.
        batch_size: windows in one forward pass.
        meter: object with `advance(tokens, perplexity=running value)`, called after each batch.
        autocast: dtype for torch.autocast on the model's device; None runs in the model's own dtype.

    Raises:
        DataError: no whole window of text, a window below 2 tokens, or one longer than the model's table of
            learned positions or than one product's logits.
        NotFiniteError: the likelihood of a token is NaN or zero.
    """
    ids = (
        texts
        if isinstance(texts, Tensor)
        else windows(tokenizer, texts, window=window, max_windows=max_windows)
    )
    if max_windows:
        ids = ids[:max_windows]
    _check_window(ids.shape[1])
    _check_positions(model, ids.shape[1])
    device = device_of(model)
    most = _most(model, ids, device)
    context = torch.autocast(device.type, dtype=autocast) if autocast is not None else nullcontext()
    training = model.training
    total, scored = 0.0, 0
    model.eval()
    try:
        # no_grad and not inference_mode: tensors that a module caches here must stay usable in training.
        with torch.no_grad():
            for batch in ids.split(max(1, min(batch_size, most))):
                batch = batch.to(device)
                with context:
                    logits = whole_logits(model, batch)
                total += _nll_sum(logits[:, :-1], batch[:, 1:])
                scored += batch[:, 1:].numel()
                if not math.isfinite(total):
                    raise NotFiniteError(_not_finite(total, logits))
                if meter is not None:
                    meter.advance(batch.numel(), perplexity=_exp(total / scored))
    finally:
        model.train(training)
    return Perplexity(value=_exp(total / scored), nll=total / scored, tokens=scored, windows=len(ids))


def windows(
    tokenizer: Any,
    texts: str | Iterable[str | Document],
    *,
    window: int = 1024,
    max_windows: int | None = None,
) -> Tensor:
    """Cut texts into token windows.

    A text that spells a control token (`<unk>` in WikiText, `</s>` in a page about tokenizers) holds its characters,
    not the token; in documents that a template wrote, the template's control tokens count.

    A tokenizer that starts every text with a BOS token (Llama, Gemma) gets one at the start of every window, which then
    holds `window - 1` tokens of text, because such a model never saw a sequence without it. No other special token is
    added.

    Args:
        tokenizer: a tokenizer of transformers.
        texts: one text or several, plain or documents; what lies beyond the need of `max_windows` is not tokenized.
        window: tokens in a window, BOS included.
        max_windows: at most this many windows; None or 0 takes all.

    Returns:
        int64 [N, window], N >= 1.

    Raises:
        DataError: the texts fill no whole window, or `window` is below 2; or as `Tokens`.
    """
    _check_window(window)
    encode = Tokens(tokenizer)
    prefix = _bos(tokenizer)
    body = window - len(prefix)
    if body < 1:
        raise DataError(f"window {window} holds no text beside the tokenizer's BOS token: use 3 or more")
    needed = max_windows * body if max_windows else math.inf
    documents = [texts] if isinstance(texts, str) else texts
    ids: list[int] = []
    for text in documents:
        ids.extend(encode.document(Document.plain(text) if isinstance(text, str) else text))
        if len(ids) >= needed:
            break
    count = int(min(needed, len(ids) // body * body)) // body
    if count == 0:
        raise DataError(
            f"text of {len(ids)} tokens is shorter than one window of {window}: "
            f"give more text or a window of at most {len(ids) + len(prefix)} (in a recipe: eval.length)"
            if len(ids) + len(prefix) >= 2
            else f"text of {len(ids)} tokens: perplexity needs at least one window of {window} tokens"
        )
    cut = torch.tensor(ids[: count * body], dtype=torch.int64).view(count, body)
    return torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(count, -1), cut], dim=1)


def _nll_sum(logits: Tensor, labels: Tensor) -> float:
    """Sum of negative log-likelihoods; logits [B, T, V], labels [B, T]. Never more than a slice of them in float32."""
    vocabulary = logits.shape[-1]
    rows = max(1, LOGITS_AT_ONCE // vocabulary)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    pieces = [
        F.cross_entropy(piece.to(dtype), target, reduction="none")
        for sample, sample_labels in zip(logits, labels, strict=True)
        for piece, target in zip(sample.split(rows), sample_labels.split(rows), strict=True)
    ]
    # Summed on the CPU: some accelerators have no float64.
    return float(torch.cat(pieces).cpu().to(torch.float64).sum())


def _not_finite(nll: float, logits: Tensor) -> str:
    bad = int((~logits.isfinite()).sum())
    return (
        f"the log-likelihood of the text is {-nll}: {bad:,} of {logits.numel():,} logits ({logits.dtype}) are not "
        "finite. The weights are damaged, or too large for this arithmetic: take another checkpoint, or train with a "
        "lower learning rate"
    )


def _exp(nll: float) -> float:
    return math.exp(nll) if not nll > 700 else math.inf


def _bos(tokenizer: Any) -> list[int]:
    """[BOS] when the tokenizer puts one before every text, else []."""
    bos = getattr(tokenizer, "bos_token_id", None)
    start = tokenizer("a")["input_ids"][:1]
    return [bos] if bos is not None and list(start) == [bos] else []


def _most(model: nn.Module, ids: Tensor, device: torch.device) -> int:
    """Windows whose logits one product may make."""
    most = sequences_at_once(model, ids.shape[1], device)
    if most == 0:
        raise DataError(
            f"window {ids.shape[1]:,} has more logits over this vocabulary than one product of a GPU may: use one of "
            f"at most {sequences_at_once(model, 1, device):,} tokens (in a recipe: eval.length), or `linearize eval`, "
            "whose texts make them a slice at a time"
        )
    return len(ids) if most is None else most


def _check_window(window: int) -> None:
    if window < 2:
        raise DataError(
            f"window {window}: a window holds at least 2 tokens, one to condition on and one to score"
        )


def _check_positions(model: nn.Module, window: int) -> None:
    """Rotary models run beyond their training length; a table of learned positions (GPT-2) has an end."""
    limit = learned_positions(model)
    if limit is not None and window > limit:
        raise DataError(
            f"window {window} exceeds the model's {limit} learned positions: use eval.length={limit}"
        )
