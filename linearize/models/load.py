"""Load a teacher: model and tokenizer, checked, ready for batches."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.errors import CheckpointError, ModelNotFoundError
from linearize.models.boundary import boundary
from linearize.models.check import check_checkpoint, dtype_of, has_tokenizer
from linearize.models.config import causal_class, read_config, refuse_quantized
from linearize.models.generation import with_cache
from linearize.models.rehearsal import check_report, rehearse
from linearize.models.resolve import resolve, resolve_config
from linearize.models.soft_cap import capped, honor_soft_cap
from linearize.models.tokenizer import check_vocabulary, load_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from linearize.models.check import Stored

log = logging.getLogger(__name__)


def load_config(model: str) -> PreTrainedConfig:
    """The config of a causal language model; no weights are loaded, and a hub model's are not downloaded.

    Where the weights are there their headers are held against it.

    Raises:
        ModelNotFoundError, CheckpointError: as `resolve`; also for a config that the weights do not fit.
        UnsupportedModelError: transformers does not know the model type, it is not a decoder, or quantized.
    """
    folder = resolve_config(model)
    tensors = _tensors(folder)
    config = read_config(folder, None if tensors is None else len(tensors))
    refuse_quantized(folder, config)
    cls, config = causal_class(folder, config)
    if tensors is not None:
        rehearse(folder, cls, config, tensors)
    return config


def stored_dtype(model: str) -> torch.dtype:
    """The floating type of most of a checkpoint's numbers; float32 for a GGUF file, which is converted to that.

    Raises:
        ModelNotFoundError, CheckpointError: as `resolve`.
    """
    import torch

    found: torch.dtype = getattr(torch, dtype_of(check_checkpoint(resolve(model))))
    return found


def _tensors(folder: Path) -> dict[str, Stored] | None:
    """What the weights hold; None where there are none, and, with a word, where `load_teacher` would refuse them."""
    try:
        return check_checkpoint(folder)
    except (CheckpointError, ModelNotFoundError) as error:
        if any(folder.glob("*.safetensors")):
            log.warning("%s. Its config alone was looked at", error)
        return None


def load_teacher(
    model: str,
    *,
    dtype: torch.dtype | str = "float32",
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
    for_text: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model in evaluation mode, and its tokenizer with a padding token and left padding.

    Args:
        model: alias, checkpoint folder, GGUF file or hub id; see `resolve`.
        dtype: of the weights.
        device: where the model goes.
        attn_implementation: of transformers; None takes its default (sdpa where the family has it). A soft cap is
            computed whichever it is, see `honor_soft_cap`.
        for_text: refuse a checkpoint without a tokenizer, before its weights are read.

    Returns:
        ``(model, tokenizer)``; the tokenizer is None where the checkpoint holds none, unless ``for_text``.

    Raises:
        ModelNotFoundError, CheckpointError: as `resolve`; also for tensors missing, left over, of the wrong shape or
            not finite, and for a tokenizer that is larger than the embedding, or missing where text is read.
        UnsupportedModelError: transformers does not know the model type, it is not a decoder, or quantized.
    """
    import torch

    from linearize.models.sound import check_finite

    folder = resolve(model)
    tensors = check_checkpoint(folder)
    config = read_config(folder, len(tensors))
    refuse_quantized(folder, config)
    cls, config = causal_class(folder, config)
    skeleton = rehearse(folder, cls, config, tensors)
    tokenizer = load_tokenizer(folder) if for_text or has_tokenizer(folder) else None
    if tokenizer is not None:
        embedding: Any = skeleton.get_input_embeddings()
        check_vocabulary(folder, tokenizer, embedding.weight.shape[0])
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    extra: dict[str, Any] = (
        {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    )
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "dtype": kind}
    with boundary(f"{folder}", "fetch the checkpoint again"):
        loaded: Any = cls.from_pretrained(
            folder, config=config, ignore_mismatched_sizes=True, **options, **extra
        )
    teacher, report = loaded
    check_report(folder, report, teacher)
    with_cache(teacher)
    if capped(teacher.config):
        honor_soft_cap(teacher)
    if tokenizer is not None and teacher.generation_config.pad_token_id is None:
        teacher.generation_config.pad_token_id = tokenizer.pad_token_id  # else generate() warns at each call
    teacher = teacher.to(device).eval()
    check_finite(folder, teacher)
    return teacher, tokenizer
