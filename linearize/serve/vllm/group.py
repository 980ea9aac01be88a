"""A converted layer in vLLM's tensor-parallel group: which heads are here, and what goes in and comes out of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.models.transformers.utils import replace_linear_class
from vllm.model_executor.models.utils import maybe_prefix

from linearize.errors import UnsupportedModelError
from linearize.mixers import Mixer
from linearize.serve.vllm.heads import cut, repeated, shared_out
from linearize.surgery.projections import projections


@dataclass(frozen=True)
class Here:
    """One process's place in the group, for one layer.

    Attributes:
        rank, ranks: which process, of how many.
        joins: whether what follows the heads wants those of all processes, as where a norm goes over all of them.
    """

    rank: int = 0
    ranks: int = 1
    joins: bool = False

    def own(self, x: Tensor, heads: int) -> Tensor:
        """What is this process's of [1, T, *, K], where a projection made all heads here; its `heads` heads."""
        return cut(x, (*x.shape[:2], heads, x.shape[3]), self.rank, self.ranks)

    def handed(self, x: Tensor) -> Tensor:
        """The heads' output [1, T, H, V] as the output projection takes it."""
        if not self.joins:
            return x
        return tensor_model_parallel_all_gather(x.flatten(2)).unflatten(2, (-1, x.shape[3]))


@dataclass
class Parted:
    """A converted layer whose heads several processes share, while vLLM puts its own linear layers in.

    Args:
        name: of the attention module in the model.
        module: itself, its projections still the family's.
        section: of the plan, its mixer's.
        group: vLLM's.
    """

    name: str
    module: Any
    section: dict[str, Any]
    group: Any

    def __post_init__(self) -> None:
        self.whole: Mixer = self.module.mixer
        found = projections(self.module)
        if len(found["o"]) != 1:
            raise UnsupportedModelError(
                f"tensor_parallel_size is {self.group.world_size}, and {self.name} ({type(self.module).__name__}) has "
                f"no single output projection inside (found {', '.join(found['o']) or 'none'}); leave it at 1"
            )
        self.names = found

    def prepare(self, quantization: Any) -> None:
        """Keep keys and values on every process where there are fewer of their heads than processes."""
        if self.whole.shape.kv_heads >= self.group.world_size:
            return
        for name in {*self.names["k"], *self.names["v"]} - set(self.names["q"]):
            linear = self.module.get_submodule(name)
            if isinstance(linear, nn.Linear):
                prefix = maybe_prefix(self.name, name)
                self.module.set_submodule(
                    name, replace_linear_class(linear, "replicate", quantization, prefix=prefix)
                )

    def finish(self) -> None:
        """Put this process's mixer in; its parameters wait for `loaders`."""
        rank, ranks = self.group.rank_in_group, self.group.world_size
        output = self.module.get_submodule(self.names["o"][0])
        parted = isinstance(output, RowParallelLinear) and output.input_is_parallel
        self.module.linearize_here = Here(rank, ranks, joins=not parted)
        with torch.device("meta"):
            self.module.mixer = shared_out(self.section, self.whole, rank, ranks)

    def loaders(self) -> None:
        """Have vLLM's loader cut what it reads for the mixer."""
        mixer, here = self.module.mixer, self.module.linearize_here
        runs = repeated(mixer)
        shapes = {name: x.shape for name, x in self.whole.named_parameters()}
        for name, parameter in mixer.named_parameters():
            parameter.weight_loader = partial(_load, here, shapes[name], runs.get(name, 1))


def _load(here: Here, whole: torch.Size, runs: int, parameter: Tensor, read: Tensor) -> None:
    if read.shape != whole:
        raise UnsupportedModelError(
            f"a mixer's tensor is {list(read.shape)} in the checkpoint and {list(whole)} by its config; export or "
            "download it again"
        )
    parameter.data.copy_(cut(read, tuple(parameter.shape), here.rank, here.ranks, runs))


def check_kept(name: str, module: nn.Module) -> None:
    """A softmax layer's output projection has to take what vLLM's attention gives: its own process's heads.

    Raises:
        UnsupportedModelError: vLLM has left the layer's projections whole, as it does with those of Phi-3.
    """
    children = list(module.children())
    own = any(isinstance(child, RowParallelLinear) and child.input_is_parallel for child in children)
    if not own or any(isinstance(child, ColumnParallelLinear) and child.gather_output for child in children):
        raise UnsupportedModelError(
            f"tensor_parallel_size is above 1, and {name} ({type(module).__name__}) stays softmax with projections "
            "that vLLM's transformers backend does not cut by heads; convert every layer, or leave it at 1"
        )


def parted(modules: dict[str, Any], sections: dict[int, dict[str, Any]], group: Any) -> Iterator[Parted]:
    """Every converted layer, where the group has more than one process.

    Args:
        modules: converted attention modules by name.
        sections: of the plan, by the layer's number.
        group: vLLM's tensor-parallel group.
    """
    if group.world_size == 1:
        return
    for name, module in modules.items():
        yield Parted(name, module, sections[module.layer_idx], group)
