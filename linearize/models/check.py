"""Is a folder a whole, loadable checkpoint? Told from file names, sizes and headers alone, in milliseconds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from linearize.errors import CheckpointError, ModelNotFoundError
from linearize.models.files import check_file, check_files, instead_of_file, leads_out, read_json
from linearize.models.generation import check_generation
from linearize.models.shards import FLOATS, Stored, check_shard

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)


def check_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        ModelNotFoundError: the folder is not a checkpoint; says what it looks like instead.
        CheckpointError: config.json is not JSON, or names no model type.
    """
    path = folder / "config.json"
    check_file(path, "fetch the checkpoint again")
    if not path.is_file():
        raise ModelNotFoundError(
            f"{folder} is not a checkpoint folder: it has no config.json{_instead(folder)}"
        )
    config = read_json(path)
    kind = config.get("model_type")
    if not kind:
        raise CheckpointError(
            f"{path} names no model_type, so the model's class is unknown; add it, or fetch the model again"
        )
    if not isinstance(kind, str):
        raise CheckpointError(
            f"{path}: model_type is {shorten(kind)}, and a name is asked for; fetch the checkpoint again"
        )
    return config


def dtype_of(tensors: dict[str, Stored]) -> str:
    """Torch's name of the floating type that most of a checkpoint's numbers have; float32 where there is none."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        if tensor.dtype in FLOATS:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return FLOATS[max(sizes, key=lambda kind: sizes[kind])] if sizes else "float32"


def check_checkpoint(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder that is a whole safetensors checkpoint.

    Each shard is held against its header and, in a sharded checkpoint, its tensors against the index.

    Raises:
        ModelNotFoundError: not a checkpoint folder.
        CheckpointError: a pipe or a device, no safetensors weights, a missing shard, a truncated or damaged one, an
            index that leads out of the folder, an adapter beside the model.
    """
    check_config(folder)
    check_files(folder)
    check_generation(folder)
    if (folder / ADAPTER).exists():
        # transformers would load it along, with whatever weight file it has
        raise CheckpointError(
            f"{folder} holds an adapter ({ADAPTER}) beside a whole model; merge it into the model, or move its files "
            "out of the folder to take the model without it"
        )
    for name in (WEIGHTS, INDEX):
        check_file(folder / name, "fetch the checkpoint again")
    if (folder / WEIGHTS).is_file():
        return check_shard(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise CheckpointError(_no_weights(folder))
    weight_map = _weight_map(folder / INDEX)
    tensors: dict[str, Stored] = {}
    for name in sorted(set(weight_map.values())):
        shard = folder / name
        found = instead_of_file(shard)
        if found or not shard.is_file():
            raise CheckpointError(
                f"{folder} is incomplete: {INDEX} names {name}, which is {found or 'missing'}; fetch the checkpoint "
                "again"
            )
        held = check_shard(shard)
        absent = {key for key, where in weight_map.items() if where == name} - set(held)
        if absent:
            raise CheckpointError(
                f"{shard} lacks {len(absent)} of the tensors that {INDEX} promises ({sorted(absent)[0]}, "
                "...); fetch the checkpoint again"
            )
        tensors |= held
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file name, of an index whose files all lie in its folder. Names are judged, not where links lead."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; fetch the checkpoint again")
    for key, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or not name.isprintable():
            raise CheckpointError(
                f"{index}: {key} lies in {shorten(name)}, which names no safetensors file; fetch the checkpoint again"
            )
        if leads_out(name):
            raise CheckpointError(
                f"{index}: {key} lies in {shorten(name)}, outside the checkpoint's folder; fetch the checkpoint again "
                "from where you trust it"
            )
    return weight_map


def is_whole(folder: Path) -> bool:
    """Whether `check_checkpoint` passes the folder."""
    try:
        check_checkpoint(folder)
    except (CheckpointError, ModelNotFoundError):
        return False
    return True


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a vocabulary."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def shorten(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


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
    return (
        f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}, and pickled weights are never loaded; fetch the "
        "checkpoint again"
    )


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
