"""A checkpoint of which some layers are loaded at a time; everything else stays on the meta device.

What is loaded goes through transformers as a whole checkpoint does, so that renamed and fused tensors (experts) come
out as they do there; only the tensors of other layers are given without their numbers.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, modeling_utils

from linearize import models
from linearize.distill import shards
from linearize.errors import CheckpointError, UnsupportedModelError
from linearize.models import routers
from linearize.models.boundary import boundary
from linearize.models.check import INDEX, WEIGHTS, check_checkpoint
from linearize.models.config import causal_class, read_config, refuse_quantized
from linearize.models.rehearsal import check_report, quiet, rehearse
from linearize.models.shards import FLOATS
from linearize.models.sound import check_finite, check_trainable
from linearize.patch import changed


class Parts:
    """A teacher that is nowhere whole.

    Args:
        source: the MODEL argument.
        dtype: of the weights.

    Attributes:
        config: of the model.
        layers: paths of its decoder layers, in order.

    Raises:
        ModelNotFoundError, CheckpointError, UnsupportedModelError: as `models.load_teacher`.
    """

    def __init__(self, source: str, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.folder = models.resolve(source)
        self.tensors = check_checkpoint(self.folder)
        config = read_config(self.folder, len(self.tensors))
        refuse_quantized(self.folder, config)
        self._cls, self.config = causal_class(self.folder, config)
        model = self.empty()
        paths = {id(module): path for path, module in model.named_modules()}
        self.layers = [paths[id(layer)] for layer in shards.blocks(model)]
        if not self.layers:
            raise UnsupportedModelError(
                f"{type(model).__name__}: has no list of layers that could be taken apart; use linearize run"
            )
        head = model.get_output_embeddings()
        self._table = paths[id(model.get_input_embeddings())]
        self._head = None if head is None else paths[id(head)]
        self._tied = head is not None and head.weight is model.get_input_embeddings().weight
        self._stored = self._names(model)
        self._files = _files(self.folder, self.tensors)

    def empty(self) -> PreTrainedModel:
        """The model without weights."""
        return rehearse(self.folder, self._cls, copy.deepcopy(self.config), self.tensors)

    def load(
        self, layers: Collection[int], *, table: bool = False, head: bool = False, device: torch.device
    ) -> PreTrainedModel:
        """The model with the weights of some layers and of what stands beside all layers.

        Args:
            layers: numbers.
            table: whether the token embeddings are loaded too.
            head: whether the output head is.
            device: where they go.

        Raises:
            CheckpointError: a file cannot be read, or a weight is not finite.
        """
        table = table or (head and self._tied)
        own = [path for number, path in enumerate(self.layers) if number in layers]
        away = {path: "meta" for path in self.layers if path not in own}
        if not table:
            away[self._table] = "meta"
        if self._head is not None and not head:
            away[self._head] = "meta"
        wanted = {
            name
            for part, names in self._stored.items()
            if part is None or part not in away
            for name in names.values()
        }
        with (
            quiet(),
            boundary(f"{self.folder}", "fetch the checkpoint again"),
            # what is on the meta device is to stay there, without hooks that would bring it back
            changed(modeling_utils, "accelerate_dispatch", lambda *_, **__: None),
        ):
            loaded: Any = self._cls.from_pretrained(
                None,
                config=copy.deepcopy(self.config),
                state_dict=self._state(wanted),
                # the block's own by name as well: transformers takes layer 10 for a part of layer 1
                device_map={"": "cpu", **away, **dict.fromkeys(own, "cpu")},
                dtype=self.dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        model, report = loaded
        check_report(self.folder, report, model)
        check_finite(self.folder, model)
        check_trainable(self.folder, model)
        routers.widen(model)  # as a whole run
        for path in own:
            empty = [name for name, x in model.get_submodule(path).state_dict().items() if x.is_meta]
            if empty:
                raise UnsupportedModelError(
                    f"{path}.{empty[0]}: its numbers are not found in {self.folder} for this layer alone; use "
                    "linearize run"
                )
        place(model, device)
        model.requires_grad_(False)
        whole: PreTrainedModel = model.eval()
        return whole

    @property
    def stored(self) -> dict[str, str]:
        """Name of a tensor as transformers writes it -> its name in this checkpoint; of all that the model reads."""
        return {name: own for names in self._stored.values() for name, own in names.items()}

    def read(self, name: str) -> Tensor:
        """A tensor of the checkpoint by its own name.

        Raises:
            CheckpointError: its file cannot be read.
        """
        [file] = [file for file, names in self._files.items() if name in names]
        try:
            with safe_open(file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
                return tensor
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}); fetch the checkpoint again") from error

    def _names(self, model: PreTrainedModel) -> dict[str | None, dict[str, str]]:
        """Module -> its tensors, see `stored`; of what stands beside all layers, table and head under None."""
        from transformers.core_model_loading import revert_weight_conversion

        parts = [*self.layers, self._table, *([] if self._head is None else [self._head])]
        found: dict[str | None, dict[str, str]] = {}
        own: dict[str | None, dict[str, Tensor]] = {None: {}}
        for name, tensor in model.state_dict().items():
            part = next((path for path in parts if name.startswith(f"{path}.")), None)
            own.setdefault(part, {})[name] = tensor
        prefix = f"{model.base_model_prefix}."
        for part, tensors in own.items():
            names = revert_weight_conversion(model, tensors)
            # checkpoints of a base model leave its name out
            ways = {name: (name, name.removeprefix(prefix), prefix + name) for name in names}
            held = {name: [way for way in three if way in self.tensors] for name, three in ways.items()}
            found[part] = {name: there[0] for name, there in held.items() if there}
        missing = [path for path in self.layers if not found.get(path)]
        if missing:
            raise UnsupportedModelError(
                f"{missing[0]}: its tensors are not found by name in {self.folder}, so it cannot be loaded by itself; "
                "use linearize run"
            )
        return found

    def _state(self, wanted: Collection[str]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for file, names in self._files.items():
            try:
                with safe_open(file, framework="pt") as opened:
                    state |= {name: opened.get_tensor(name) for name in names if name in wanted}
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{file} cannot be read ({error}); fetch the checkpoint again"
                ) from error
        for name, stored in self.tensors.items():
            if name not in state:
                kind = getattr(torch, FLOATS.get(stored.dtype, "int64"))
                state[name] = torch.empty(stored.shape, dtype=kind, device="meta")
        return state


def _files(folder: Path, tensors: Iterable[str]) -> dict[Path, list[str]]:
    """Weight file -> its tensors."""
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: list(tensors)}
    found: dict[Path, list[str]] = {}
    for name, file in json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].items():
        found.setdefault(folder / file, []).append(name)
    return found


def place(model: torch.nn.Module, device: torch.device) -> None:
    """Bring what a model has in memory to a device."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not parameter.is_meta:
                parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
