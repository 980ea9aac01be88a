"""What a bit-equal resume needs beside the weights: optimizer moments and random states."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linearize.distill import shards
from linearize.distill.pieces import Pieces
from linearize.errors import CheckpointError
from linearize.storing import AGAIN, read_json


def read(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint.

    Raises:
        CheckpointError: it is damaged; only a checkpoint without checksums gets this far.
    """
    remedy = f"Delete {folder}, then {AGAIN}: it goes on from the checkpoint before"
    saved = read_json(folder / "state.json", remedy)
    if not {"lr", "scheduler", "rng", "window_steps"} <= saved.keys():
        raise CheckpointError(f"{folder / 'state.json'}: lacks what a resume needs. {remedy}")
    return saved


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]
) -> dict[str, Tensor]:
    """The optimizer's per-parameter state as ``{"<parameter>/<slot>": tensor}``.

    Args:
        optimizer: every state entry is a tensor (AdamW).
        names: parameter -> its name in the checkpoint.
    """
    return {
        f"{name}/{slot}": value
        for parameter, name in names.items()
        for slot, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, pieces: Pieces, names: Mapping[nn.Parameter, str]
) -> None:
    """Put what `optimizer_tensors` gave back, each tensor on its parameter's device, and sharded as that is."""
    slots: dict[str, dict[str, Tensor]] = {}
    parameters = {name: parameter for parameter, name in names.items()}
    for key, shape in pieces.shapes.items():
        name, _, slot = key.rpartition("/")
        parameter = parameters.get(name)
        if parameter is not None and shape == parameter.shape:
            value = shards.like(pieces.of(key, parameter), parameter)
        else:
            value = pieces.whole(key)
        slots.setdefault(name, {})[slot] = value
    # load_state_dict numbers the parameters in the order of the groups.
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state = optimizer.state_dict()
    state["state"] = {index: slots[name] for index, name in enumerate(order) if name in slots}
    optimizer.load_state_dict(state)


def load_rates(optimizer: torch.optim.Optimizer, schedule: Any, saved: Mapping[str, Any]) -> None:
    """Put the learning rates and the schedule's step back; groups may be others, as a sharded run's are.

    Args:
        optimizer: of `optimizer.build_optimizer`.
        schedule: of its rates.
        saved: state.json of a checkpoint.
    """
    for group in optimizer.param_groups:
        group["lr"] = saved["lr"][-1 if group["apart"] else 0]
    steps = {key: saved["scheduler"][key] for key in ("last_epoch", "_step_count")}
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule.load_state_dict({**schedule.state_dict(), **steps, "_last_lr": rates})


def rng_tensors() -> dict[str, Tensor]:
    """Torch's generators: CPU and, where there is one, the current CUDA device."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def rng_numbers() -> dict[str, Any]:
    """Python's and NumPy's generators as JSON values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, following = random.getstate()
    return {
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), following],
    }


def restore_rng(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Put every generator back where `rng_tensors` and `rng_numbers` found it."""
    restore_torch(tensors)
    kind, keys, position, has_gauss, gauss = numbers["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, following = numbers["python"]
    random.setstate((version, tuple(internal), following))


def restore_torch(tensors: Mapping[str, Tensor]) -> None:
    """Put torch's generators back where `rng_tensors` found them."""
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
