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

from linearize import export, storing
from linearize.config.schema import Recipe
from linearize.distill import processes, shards
from linearize.distill.folder import ADAPTER, RunFolder
from linearize.distill.trainable import unwrapped
from linearize.errors import UnsupportedModelError
from linearize.export import rounding, streamed
from linearize.export.adapter import save_adapter
from linearize.export.save import Weights


def check(model: Any) -> None:
    """Refuse a family whose checkpoints hold other tensors than its modules, and not just under other names.

    Args:
        model: the teacher, as transformers has loaded it.

    Raises:
        UnsupportedModelError: it is of such a family.
    """
    held = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.state_dict().items()}
    if _names(model, held) is None:
        raise UnsupportedModelError(
            f"run.shard: a checkpoint of {type(model).__name__} holds its weights in another form than the model, and "
            "no sharded run can write it yet: set run.shard=none"
        )


def _names(model: Any, like: Mapping[str, Tensor]) -> dict[str, str] | None:
    """Each tensor's name in a checkpoint of transformers; None where some are there in another form."""
    from transformers.core_model_loading import revert_weight_conversion

    found = {}
    for name, tensor in like.items():
        stored = revert_weight_conversion(model, {name: tensor})
        if [part.shape for part in stored.values()] != [tensor.shape]:
            return None
        [found[name]] = stored
    return found


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

    A tensor at a time is put together, in every process; memory holds one file of weights.

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
    names = _names(unwrapped(model), {name: like[name] for name in once.values()})
    assert names is not None, "`check` has let it through"
    own = {stored: name for name, stored in names.items()}
    partial = folder.path / f"{storing.PARTIAL}weights"
    processes.alone(lambda: storing.make_anew(partial))
    found: dict[str, list[Any]] = {}

    def stream() -> None:
        try:
            written = streamed.write(
                partial,
                lambda stored: _tensor(unwrapped(model), own[stored], like[own[stored]].dtype, merges),
                {stored: like[name] for stored, name in own.items()},
                writes=processes.rank() == 0,
            )
        except (OSError, SafetensorError) as error:
            raise storing.could_not_write(partial, error) from error
        found.update({name: written[names[once[id(tensor)]]] for name, tensor in like.items() if written})

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
    own = type(model).__mro__[2]  # behind what `fully_shard` puts in front
    with torch.device("meta"):
        twin: Any = own(copy.deepcopy(model.config))
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
