"""Base weights in shards: each process keeps a part of every block, and has a whole block while that computes.

Weights, gradients and moments of what is sharded take a process's share of the memory (Rajbhandari et al. 2020, arXiv
1910.02054, section 5, ZeRO-3), by torch's `fully_shard`. Embeddings, head and last norm are one group, so that tied
ones stay tied; it is whole through a step, since the losses read the head after the model. Mixers and adapters are
small, are calibrated, measured and trained outside a block's own pass, and stay whole in each process; so do routers of
experts, which are in float32 where a block is gathered in sixteen bits.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from linearize import surgery
from linearize.config.schema import Recipe
from linearize.distill import roles
from linearize.errors import LinearizeError, UnsupportedModelError
from linearize.models.routers import routers
from linearize.models.unwrapped import unwrapped

AXIS = "fsdp"
"""Name of the mesh's one dimension; peft tells by it that a sharded layer computes whole."""


def into_shards(model: Any, device: torch.device, passes: torch.dtype | None = None) -> None:
    """Shard a model over all processes, block by block, and bring it to the device; nobody ever holds it whole there.

    Args:
        model: a causal language model, converted or not, the same in all processes; changed in place.
        device: of this process.
        passes: dtype in which weights are gathered, gradients being added up in float32; None: that of the weights.
            Where float32 weights train under autocast it has to be that of the passes: else every product would keep
            its own copy of a whole weight for the backward pass, and shards would save nothing.

    Raises:
        UnsupportedModelError: blocks share weights.
    """
    apart = [*(layer.mixer for layer in surgery.converted(model)), *routers(model)]
    kept = {parameter for part in apart for parameter in part.parameters()}
    for part in apart:
        part.to(device)
    found = blocks(model)
    _check_apart(model, found)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=(AXIS,))
    policy = MixedPrecisionPolicy()
    if passes is not None:
        policy = MixedPrecisionPolicy(passes, torch.float32, cast_forward_inputs=False)
    for part in (*found, model):
        fully_shard(part, mesh=mesh, ignored_params=kept, mp_policy=policy)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            # losses come divided by the whole step's tokens, so that gradients are sums; gloo has plain sums alone
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


def in_shards(model: nn.Module) -> bool:
    """Whether `into_shards` has been at a model, or at what a PeftModel stands around."""
    return isinstance(unwrapped(model), FSDPModule)


def class_of(model: nn.Module) -> type[nn.Module]:
    """A model's class, behind those that `fully_shard` puts in front."""
    return next(
        cls for cls in type(model).__mro__ if issubclass(cls, nn.Module) and not issubclass(cls, FSDPModule)
    )


def settle(model: nn.Module) -> None:
    """Let go of what is gathered, so that a sharded model's parameters are its shards; nothing happens to others."""
    if in_shards(model):
        cast(FSDPModule, unwrapped(model)).reshard()


def run_body(model: nn.Module, **given: Any) -> None:
    """A forward pass whose logits have no reader: the model without its head.

    A sharded one is called as a whole, since only that gathers its embeddings, and makes logits of one token.

    Args:
        model: a causal language model, or a PeftModel around one.
        given: arguments of its forward pass.
    """
    base = unwrapped(model)
    if not in_shards(model):
        base.base_model(**given)
        return
    few = (
        {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(base).forward).parameters else {}
    )
    base(**given, **few)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The members of a model's longest list of modules that stands in no other one."""
    found: list[list[nn.Module]] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                found.append(list(child))
            else:
                walk(child)

    walk(model)
    return max(found, key=len, default=[])


def _check_apart(model: nn.Module, found: list[nn.Module]) -> None:
    owners: dict[int, int] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    inside = {id(part) for block in found for part in block.modules()}
    rest = [part for part in model.modules() if id(part) not in inside]
    groups = [[*block.parameters()] for block in found]
    groups.append([p for part in rest for p in part.parameters(recurse=False)])
    for number, group in enumerate(groups):
        for parameter in group:
            if owners.setdefault(id(parameter), number) != number:
                raise UnsupportedModelError(
                    f"run.shard: {names[id(parameter)]} is shared by several blocks, and a shard belongs to one: set "
                    "run.shard=none"
                )


def check(recipe: Recipe, model: Any) -> None:
    """Refuse what a sharded run cannot do, as soon as the model is known.

    Args:
        recipe: of the run.
        model: the teacher.

    Raises:
        LinearizeError: a stage unties embeddings that are tied, or the teacher is to be kept elsewhere.
    """
    if recipe.run.teacher_device == "cpu":
        raise LinearizeError(
            "run.teacher_device: cpu is for a teacher that is whole; in shards each process has a part of it: set "
            "run.teacher_device=auto, or run.shard=none"
        )
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is table.weight
    for name, stage in recipe.stages.items():
        if stage.untie and tied:
            raise LinearizeError(
                f"stages.{name}.untie: tied embeddings are one shard and stay tied: set stages.{name}.untie=false, or "
                "run.shard=none"
            )


def widen(model: nn.Module, recipe: Recipe) -> None:
    """Bring what some stage trains to float32 before there are shards, whose dtype stays."""
    for stage in recipe.stages.values():
        if "all" in stage.train:
            frozen = roles.parameters_of(model, stage.freeze)
            for parameter in model.parameters():
                if id(parameter) not in frozen:
                    parameter.data = parameter.data.float()


# Tensors


def own(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, the storage itself; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, in all processes, which all have to call this; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensor: Any) -> bool:
    """Whether a process has a part of it alone."""
    return isinstance(tensor, DTensor)


def rows(tensor: Tensor) -> tuple[int, int]:
    """First and last row of a sharded tensor that are this process's own, as torch.chunk cuts it; all of another one.

    The second is that after the last; both are the tensor's end where a process has none.
    """
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0] if tensor.ndim else 1
    count, mesh = tensor.shape[0], tensor.device_mesh
    each = -(-count // mesh.size())
    first = min(each * mesh.get_local_rank(), count)
    last = min(first + each, count)
    assert last - first == (len(own(tensor)) if own(tensor).numel() else 0), "another cut than torch.chunk's"
    return first, last


def like(values: Tensor, parameter: Tensor) -> Tensor:
    """A process's own rows as a tensor that is sharded as its parameter; as they are where that is not."""
    if not isinstance(parameter, DTensor):
        return values
    return DTensor.from_local(
        values.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


# Gradients


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients, whole and sharded ones, the same in all processes."""
    gradients = list(gradients)
    parts, kept = _apart(gradients)
    if not parts:
        return get_total_norm(kept)
    norms = [whole(get_total_norm(parts))]
    if kept:
        norms.append(get_total_norm(kept))
    return torch.linalg.vector_norm(torch.stack(norms))


def clip(parameters: Iterable[nn.Parameter], most: float, norm: Tensor) -> None:
    """Scale gradients as `clip_grad_norm_` does, sharded ones in their parts."""
    parts, kept = _apart(parameters)
    clip_grads_with_norm_(kept, most, norm)
    gradients = [own(parameter.grad) for parameter in parts if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))


def _apart(tensors: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """Those that are sharded, and those that are not."""
    found: tuple[list[Any], list[Any]] = ([], [])
    for tensor in tensors:
        found[not is_sharded(tensor)].append(tensor)
    return found
