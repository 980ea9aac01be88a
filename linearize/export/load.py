"""Load a converted checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from linearize import auto
from linearize.errors import CheckpointError


def load(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """A converted model, ready for `generate()`.

    Args:
        path: a folder that `save` wrote, or a hub id of one.
        **kwargs: handed to `from_pretrained` (`dtype`, `device_map`, ...). Code in the checkpoint is never run.

    Raises:
        CheckpointError: no checkpoint there, or one that is truncated, corrupt or of another format.
    """
    folder = Path(path)
    auto.install()
    if folder.is_dir() or folder.is_absolute() or str(path).startswith("."):
        _check_folder(folder)
    kwargs.setdefault("dtype", "auto")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, trust_remote_code=False, **kwargs
        )
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: a weight file is corrupt or truncated ({error}); export or download it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be loaded ({error})") from error
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} parameters are missing ({missing[0]}, ...); the checkpoint is incomplete, "
            "export it again"
        )
    return model.eval()


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        inside = folder / "checkpoint"
        hint = "a checkpoint folder holds config.json and *.safetensors"
        if (inside / "config.json").is_file():
            hint = f"did you mean {inside}?"
        raise CheckpointError(f"{folder}: no config.json there; {hint}")
    try:
        json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise CheckpointError(
            f"{folder}/config.json is not JSON ({error}); export the checkpoint again"
        ) from error
    if not list(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder}: no *.safetensors there; pickled weights (.bin, .pt) are never loaded"
        )
