"""Which model MODEL means, and which text a run reads: told by what files hold, not by how they are spelled."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from linearize import models
from linearize.models.cache import content_hash
from linearize.models.check import INDEX, WEIGHTS, check_config

_DIGITS = 16
_INCIDENTAL = ("_name_or_path", "transformers_version")
"""Entries of config.json that say where a model came from and not what it is."""
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def fingerprint(model: str) -> dict[str, str]:
    """Checksums of a model's three parts: config, weights and tokenizer.

    The weights are read once; after that `content_hash` remembers them.

    Args:
        model: as `models.resolve` takes it; fetched and converted where need be.

    Raises:
        ModelNotFoundError, CheckpointError: as `models.resolve`.
    """
    folder = models.resolve(model)
    config = {key: value for key, value in check_config(folder).items() if key not in _INCIDENTAL}
    return {
        "config": _digest(json.dumps(config, sort_keys=True)),
        "weights": _digest(
            *(f"{path.name} {path.stat().st_size} {content_hash(path)}" for path in _weights(folder))
        ),
        "tokenizer": _digest(
            *(f"{name} {content_hash(folder / name)}" for name in _TOKENIZER if (folder / name).is_file())
        ),
    }


def digest(dataset: Any) -> str:
    """Checksum of all sequences of a text, with their positions and padding."""
    found = hashlib.sha256()
    for index in range(len(dataset)):
        item = dataset[index]
        for key in ("input_ids", "position_ids", "attention_mask"):
            if key in item:
                found.update(torch.as_tensor(item[key]).to(torch.int64).numpy().tobytes())
    return found.hexdigest()[:_DIGITS]


def _weights(folder: Path) -> list[Path]:
    """The weight files, in the order of their names; the single file wins, as it does in loading."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(names))]


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:_DIGITS]
