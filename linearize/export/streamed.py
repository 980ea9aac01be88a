"""Weights as an ordinary sharded checkpoint, tensor by tensor: nobody holds the model, the disk has it in the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from linearize.export.reloading import fingerprint
from linearize.modes import open_up

INDEX = "model.safetensors.index.json"


def write(
    folder: Path,
    tensors: Callable[[str], Tensor],
    like: Mapping[str, Tensor],
    *,
    writes: bool,
    max_shard_size: str = "5GB",
) -> dict[str, list[Any]]:
    """Write a checkpoint's weight files as transformers names them.

    Args:
        folder: of the checkpoint.
        tensors: puts the tensor of a name together, on the CPU; all processes ask for all of them in the same order.
        like: name -> the same on the meta device, of the shape and dtype that is written; ones that are tied once.
        writes: whether this process does.
        max_shard_size: of a file, and about what is in memory at once.

    Returns:
        `fingerprint` of each tensor; {} where this process does not write.

    Raises:
        OSError, SafetensorError: the disk is full or refuses; all tensors have been asked for by then.
    """
    split = split_torch_state_dict_into_shards(dict(like), max_shard_size=max_shard_size)
    found: dict[str, list[Any]] = {}
    failure: Exception | None = None
    for file, names in split.filename_to_tensors.items():
        held: dict[str, Tensor] = {}
        for name in names:
            tensor = tensors(name)
            assert (tensor.dtype, tensor.shape) == (like[name].dtype, like[name].shape), name
            if writes and failure is None:
                held[name] = tensor.contiguous()
                found[name] = fingerprint(tensor)
        if held:
            try:
                save_file(held, folder / file, {"format": "pt"})
                open_up(folder / file)
            except (OSError, SafetensorError) as error:
                failure = error  # the others go on asking for tensors, and so must this process
    if failure is not None:
        raise failure
    if writes and split.is_sharded:
        total = {"total_parameters": sum(tensor.numel() for tensor in like.values()), **split.metadata}
        index: dict[str, Any] = {"metadata": total, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return found
