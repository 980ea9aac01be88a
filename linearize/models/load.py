"""Load a teacher: model and tokenizer, checked, ready for batches."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.errors import CheckpointError, UnsupportedModelError
from linearize.models.check import has_tokenizer
from linearize.models.resolve import resolve, resolve_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def load_config(model: str) -> PreTrainedConfig:
    """The model's config; no weights are loaded, and a hub model's are not downloaded.

    Raises:
        ModelNotFoundError, CheckpointError: as `resolve`.
        UnsupportedModelError: transformers does not know the model type.
    """
    return _config(resolve_config(model))


def load_teacher(
    model: str,
    *,
    dtype: torch.dtype | str = "float32",
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model in evaluation mode, and its tokenizer with a padding token and left padding.

    Args:
        model: alias, checkpoint folder, GGUF file or hub id; see `resolve`.
        dtype: of the weights.
        device: where the model goes.
        attn_implementation: of transformers; None takes its default (sdpa where the family has it).

    Returns:
        ``(model, tokenizer)``; the tokenizer is None where the checkpoint holds none.

    Raises:
        ModelNotFoundError, CheckpointError: as `resolve`; also for tensors missing or of the wrong shape.
        UnsupportedModelError: transformers does not know the model type, or it is not a decoder.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder = resolve(model)
    config = _config(folder)
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    extra: dict[str, Any] = (
        {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    )
    # Sizes are judged below: the exception that transformers raises names no tensor.
    options: dict[str, Any] = {
        "use_safetensors": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=kind, **options, **extra
        )
    except ValueError as error:
        if "for this kind of AutoModel" not in str(error):
            raise
        raise UnsupportedModelError(
            f"{folder}: a '{config.model_type}' model has no causal language model in transformers; give a decoder"
        ) from error
    teacher, report = loaded
    _check_report(folder, report)
    tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
    if tokenizer is not None and teacher.generation_config.pad_token_id is None:
        teacher.generation_config.pad_token_id = tokenizer.pad_token_id  # else generate() warns at each call
    return teacher.to(device).eval(), tokenizer


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the left; where it has no padding token, its end-of-text token pads.

    Args:
        model: a checkpoint folder, or anything that `resolve` takes.

    Raises:
        CheckpointError: the checkpoint holds no tokenizer, or one that cannot be read.
    """
    from transformers import AutoTokenizer

    folder = model if isinstance(model, Path) else resolve(model)
    if not has_tokenizer(folder):
        raise CheckpointError(
            f"{folder} holds no tokenizer (no tokenizer.json or vocabulary file), and text cannot be read "
            "or written without one; copy the tokenizer's files into the folder"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be loaded: {error}; fetch the checkpoint again"
        ) from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _check_report(folder: Path, report: dict[str, Any]) -> None:
    """Refuse what transformers would fill with random numbers and only warn of."""
    unfit = sorted(report["mismatched_keys"])
    if unfit:
        name, found, wanted = unfit[0]
        raise CheckpointError(
            f"{folder}: {len(unfit)} tensors do not fit config.json ({name} is {list(found)}, and {list(wanted)} is "
            "asked for); fetch the checkpoint again"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        more = ", ..." if len(missing) > 3 else ""
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the model's tensors ({', '.join(missing[:3])}{more}); fetch the "
            "checkpoint again"
        )


def _config(folder: Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModelError(
            f"{folder}: this version of transformers cannot read its config.json ({text}); models that "
            "bring their own code are never run, so upgrade transformers or give a model of a family that "
            "it knows"
        ) from error
