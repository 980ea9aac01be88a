"""Whether a checkpoint holds a conversion's weights as they are, which further exports begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from linearize.errors import CheckpointError


def check_plain(path: Path, config: Any, why: str) -> None:
    """Refuse what is no conversion, is quantized, or keeps adapters beside its weights.

    Args:
        path: of the checkpoint.
        config: its config.
        why: adapters are in the way, for the message.

    Raises:
        CheckpointError: says what to give instead.
    """
    if not isinstance(getattr(config, "linearize", None), dict):
        raise CheckpointError(
            f"{path} is no converted checkpoint; give a folder that `linearize run` or linearize.save wrote"
        )
    if getattr(config, "quantization_config", None):
        raise CheckpointError(f"{path} is quantized already; give the checkpoint that it was made from")
    if (path / "adapter").is_dir():
        raise CheckpointError(
            f"{path} keeps adapters beside its weights, and {why}; merge them first: "
            "linearize.load_adapter(linearize.load(PATH), PATH + '/adapter').merge_and_unload(), then linearize.save"
        )
