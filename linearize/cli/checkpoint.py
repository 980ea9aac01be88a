"""What `eval` and `generate` load: an export, a run folder, or any model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from linearize.console import quiet_libraries
from linearize.errors import CheckpointError, LinearizeError

log = logging.getLogger(__name__)


def load(path: str, device: str = "auto") -> tuple[Any, Any]:
    """Model in evaluation mode, with the adapter that lies beside its weights, and tokenizer.

    Args:
        path: exported checkpoint, run folder (its `checkpoint` is taken), or a MODEL as for `linearize run`.
        device: auto, cpu or cuda.

    Raises:
        LinearizeError: the model is not found, damaged, or lacks a tokenizer.
    """
    from linearize import models
    from linearize.models.tokenizer import check_vocabulary

    quiet_libraries()
    folder = models.resolve(export_of(path))
    target = pick_device(device)
    if _is_linearized(folder):
        from linearize import export

        model: Any = export.load(folder)
        if (folder / "adapter").is_dir():  # of a run that keeps it apart, and that measured the model with it
            log.info("%s: with the adapter that lies in it", folder)
            model = export.load_adapter(model, folder / "adapter").merge_and_unload()
        model = model.to(target).eval()
    else:
        model, _ = models.load_teacher(str(folder), device=target)
    tokenizer = models.load_tokenizer(folder)
    check_vocabulary(folder, tokenizer, model.get_input_embeddings().weight.shape[0])
    return model, tokenizer


def export_of(path: str) -> str:
    """The export inside a run folder; any other path as it is."""
    folder = Path(path)
    if (folder / "recipe.yaml").is_file() and not (folder / "config.json").is_file():
        if not (folder / "checkpoint").is_dir():
            raise CheckpointError(
                f"{path} is a run folder without a checkpoint yet; go on with `linearize run ... --resume`"
            )
        return str(folder / "checkpoint")
    return path


def pick_device(device: str) -> str:
    """cuda where there is one, unless told otherwise."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise LinearizeError(
            "--device cuda: torch sees no CUDA device; leave the option out or install a CUDA build"
        )
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _is_linearized(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return "linearize" in config
