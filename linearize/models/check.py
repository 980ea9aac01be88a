"""Is a folder a whole, loadable checkpoint? Told from file names, sizes and headers alone, in milliseconds."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from linearize.errors import CheckpointError, ModelNotFoundError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format itself."""


def check_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        ModelNotFoundError: the folder is not a checkpoint; says what it looks like instead.
        CheckpointError: config.json is not JSON, or names no model type.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelNotFoundError(
            f"{folder} is not a checkpoint folder: it has no config.json{_instead(folder)}"
        )
    config = _read_json(path)
    if not config.get("model_type"):
        raise CheckpointError(
            f"{path} names no model_type, so the model's class is unknown; add it, or fetch the model again"
        )
    return config


def check_checkpoint(folder: Path) -> None:
    """Refuse a folder that is not a whole safetensors checkpoint.

    Each shard's size is held against its header and, in a sharded checkpoint, its tensors against the index.

    Raises:
        ModelNotFoundError: not a checkpoint folder.
        CheckpointError: no safetensors weights, a missing shard, a truncated or damaged one.
    """
    check_config(folder)
    if (folder / WEIGHTS).is_file():
        check_shard(folder / WEIGHTS)
        return
    if not (folder / INDEX).is_file():
        raise CheckpointError(_no_weights(folder))
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map; fetch the checkpoint again")
    for name in sorted(set(weight_map.values())):
        shard = folder / name
        if not shard.is_file():
            raise CheckpointError(
                f"{folder} is incomplete: {INDEX} names {name}, which is missing; fetch the checkpoint again"
            )
        absent = {key for key, where in weight_map.items() if where == name} - check_shard(shard)
        if absent:
            raise CheckpointError(
                f"{shard} lacks {len(absent)} of the tensors that {INDEX} promises ({sorted(absent)[0]}, "
                "...); fetch the checkpoint again"
            )


def is_whole(folder: Path) -> bool:
    """Whether `check_checkpoint` passes the folder."""
    try:
        check_checkpoint(folder)
    except (CheckpointError, ModelNotFoundError):
        return False
    return True


def check_shard(file: Path) -> set[str]:
    """The names of the tensors in a safetensors file whose size is the one its header asks for.

    Raises:
        CheckpointError: the file is cut short, or its header is damaged.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length and length <= MAX_HEADER and size < 8 + length:
            raise CheckpointError(_truncated(file, size, f"its header alone takes {8 + length:,}"))
        header = stream.read(length) if 0 < length <= MAX_HEADER else b""
    try:
        tensors = {key: value for key, value in json.loads(header).items() if key != "__metadata__"}
        end = max((value["data_offsets"][1] for value in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{file} is damaged: its safetensors header cannot be read; fetch it again"
        ) from error
    if size != 8 + length + end:
        raise CheckpointError(_truncated(file, size, f"its header asks for {8 + length + end:,}"))
    return set(tensors)


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a vocabulary."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _truncated(file: Path, size: int, rule: str) -> str:
    return f"{file} is truncated or damaged: it has {size:,} bytes, {rule}; fetch it again"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({error}); fetch the checkpoint again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a mapping; fetch the checkpoint again"
        )
    return content


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if pickles:
        return (
            f"{folder} holds only pickle weights ({', '.join(pickles[:3])}), which can run code when read "
            "and are never loaded; convert them to safetensors first (transformers' save_pretrained writes "
            "that), or take a revision of the model that has them"
        )
    if others:
        return (
            f"{folder} has neither {WEIGHTS} nor {INDEX}, only {', '.join(others[:3])}; if shards are "
            "missing fetch the checkpoint again, else rename the file that holds the whole model"
        )
    return f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}; fetch the checkpoint again"


def _instead(folder: Path) -> str:
    """What a folder without config.json probably is, as the end of a sentence."""
    if (folder / "adapter_config.json").is_file():
        return ", only a peft adapter; merge it into its base model first and give the merged folder"
    if (folder / "checkpoint" / "config.json").is_file():
        return f"; give the checkpoint inside it: {folder / 'checkpoint'}"
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        return f"; give the GGUF file inside it: {ggufs[0]}"
    inner = sorted(path.parent for path in folder.glob("*/config.json"))
    if inner:
        return f"; did you mean {inner[0]}?"
    return "; give a folder that save_pretrained wrote, a GGUF file, an alias or a hub id"
