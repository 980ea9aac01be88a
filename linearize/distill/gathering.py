"""The checkpoint at the end of a sharded run: its weights go to the disk one by one, its other files as ever."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from linearize import export, storing
from linearize.config.schema import Recipe
from linearize.distill import processes, shards
from linearize.distill.folder import ADAPTER, RunFolder
from linearize.errors import UnsupportedModelError
from linearize.export import rounding, streamed
from linearize.export.adapter import save_adapter
from linearize.export.save import Weights
from linearize.models.unwrapped import unwrapped


def check(model: Any) -> None:
    """Refuse a family whose checkpoints cannot be made of its modules' tensors one by one.

    Args:
        model: the teacher, as transformers has loaded it.

    Raises:
        UnsupportedModelError: it is of such a family.
    """
    held = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.state_dict().items()}
    apart = {
        key: part.shape for name, tensor in held.items() for key, part in _stored(model, name, tensor).items()
    }
    together = {key: part.shape for key, part in revert_weight_conversion(model, held).items()}
    if apart != together:
        raise UnsupportedModelError(
            f"run.shard: a checkpoint of {type(model).__name__} holds weights that several tensors of the model make "
            "together, and no sharded run can write it yet: set run.shard=none"
        )


def _stored(model: Any, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What a checkpoint of transformers holds for a tensor: the same under some name, or the weights of each expert."""
    stored: dict[str, Tensor] = revert_weight_conversion(model, {name: tensor})
    return stored


class _Parts:
    """Tensors of a checkpoint, made of the model's as they are asked for, those of one after the other.

    Args:
        model: sharded.
        like: the model's tensors by name, of the dtypes that are written.
        merges: whether adapters' updates go into the weights.

    Attributes:
        stored: name in the checkpoint -> the same on the meta device.
        names: the model's names -> those in the checkpoint.
    """

    def __init__(self, model: Any, like: Mapping[str, Tensor], merges: bool) -> None:
        self.model, self.like, self.merges = model, like, merges
        self.stored: dict[str, Tensor] = {}
        self.names: dict[str, list[str]] = {}
        self._owners: dict[str, str] = {}
        self._newest: tuple[str, dict[str, Tensor]] = ("", {})
        for name, tensor in like.items():
            parts = _stored(model, name, tensor)
            self.stored |= parts
            self.names[name] = list(parts)
            self._owners |= dict.fromkeys(parts, name)

    def __call__(self, stored: str) -> Tensor:
        """Put one together; all processes call this in the same order."""
        name = self._owners[stored]
        if self._newest[0] != name:
            self._newest = ("", {})
            found = _tensor(self.model, name, self.like[name].dtype, self.merges)
            self._newest = (name, _stored(self.model, name, found))
        part = self._newest[1][stored]
        return (
            part if len(self._newest[1]) == 1 else part.clone()
        )  # a file refuses tensors that share their memory

    def fingerprint(self, name: str, written: Mapping[str, list[Any]]) -> list[Any]:
        """That of the model's own tensor, from those of what was written: bits are summed, in any order."""
        parts = [written[stored] for stored in self.names[name]]
        return [parts[0][0], list(self.like[name].shape), sum(bits for _, _, bits in parts)]


def checkpoint(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    folder: RunFolder,
    *,
    rows: list[dict[str, Any]],
    dtype: torch.dtype,
    base: str,
) -> Path:
    """`exporting.checkpoint` of a model in shards; all processes call it, and the first one writes.

    A tensor at a time is put together, in every process; memory holds it and one file of weights.

    Args:
        model, tokenizer, recipe, folder, rows, dtype, base: see there.
    """
    shards.settle(model)
    lora = [stage.lora for stage in recipe.stages.values() if stage.lora is not None]
    adapted = hasattr(model, "merge_and_unload")
    merges = adapted and all(adapters.merge for adapters in lora)
    twin = _twin(unwrapped(model), dtype)
    like: dict[str, Tensor] = twin.state_dict(keep_vars=True)
    once: dict[int, str] = {}
    for name, tensor in like.items():
        once.setdefault(id(tensor), name)
    parts = _Parts(unwrapped(model), {name: like[name] for name in once.values()}, merges)
    partial = folder.path / f"{storing.PARTIAL}weights"
    processes.alone(lambda: storing.make_anew(partial))
    found: dict[str, list[Any]] = {}

    def stream() -> None:
        try:
            written = streamed.write(partial, parts, parts.stored, writes=processes.rank() == 0)
        except (OSError, SafetensorError) as error:
            raise storing.could_not_write(partial, error) from error
        if written:
            found.update(
                {name: parts.fingerprint(once[id(tensor)], written) for name, tensor in like.items()}
            )

    processes.each(stream)

    def finish() -> Path:
        apart = None
        if adapted and not merges:
            apart = folder.path / ADAPTER
            save_adapter(model, apart, base=folder.checkpoint)
        path = export.save(
            twin,
            folder.checkpoint,
            tokenizer=tokenizer,
            recipe=dataclasses.asdict(recipe),
            metrics={"rows": rows},
            base=base,
            weights=Weights(partial, found),
            check=True,
        )
        if apart is not None:
            apart.rename(path / "adapter")
        storing.remove(partial)
        return path

    return processes.alone(finish)


def _twin(model: Any, dtype: torch.dtype) -> Any:
    """The model without wrappers and without weights, of the dtypes that its checkpoint gets."""
    with torch.device("meta"):
        twin: Any = shards.class_of(model)(copy.deepcopy(model.config))
    twin.generation_config = model.generation_config
    twin.tie_weights()
    return rounding.in_dtype(twin, dtype).eval()


def _tensor(model: nn.Module, name: str, dtype: torch.dtype, merges: bool) -> Tensor:
    """A tensor of the checkpoint, put together on the CPU, with its adapter's update if there is one."""
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    adapted = hasattr(module, "get_base_layer")
    tensor: Tensor = getattr(module.get_base_layer() if adapted else module, leaf)
    found = shards.whole(tensor.detach())
    if adapted and merges and leaf == "weight":
        # as `rounding.merged`: rounded once, after the update
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        for adapter in module.active_adapters:
            found = found + module.get_delta_weight(adapter).detach().to(found)
    return found.to(dtype).cpu()
