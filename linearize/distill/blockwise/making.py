"""Blocks as they are needed: loaded, held against the untouched layers, converted with the mixers of a whole run."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from linearize import surgery
from linearize.config.schema import Recipe
from linearize.distill.blockwise.block import Block
from linearize.distill.blockwise.division import named
from linearize.distill.blockwise.parts import Parts
from linearize.errors import NotFiniteError, UnsupportedModelError
from linearize.mixers import calibration
from linearize.surgery.demands import check_rotation
from linearize.surgery.inspection import rotations
from linearize.surgery.model import honor_softcap, linearized
from linearize.surgery.schema import mixer_of, put
from linearize.surgery.verify import softmax_view, tolerance

TOKENS = 4
"""Of the pass that shows how queries are rotated."""
ROWS = 2
"""Of the stream, on which a converted block is held against the untouched one."""


class Maker:
    """Loads and converts one block after the other.

    Args:
        parts: of the teacher.
        recipe: of the run.
        device: where blocks go.
        autocast: dtype of the passes, or None.

    Attributes:
        plan: what the converted model's config holds; how queries are rotated is known of layers that were loaded.

    Raises:
        UnsupportedModelError, RecipeError: as `surgery.convert`.
    """

    def __init__(
        self, parts: Parts, recipe: Recipe, device: torch.device, autocast: torch.dtype | None
    ) -> None:
        self.parts, self.recipe, self.device, self.autocast = parts, recipe, device, autocast
        with torch.device("meta"):
            empty = surgery.convert(parts.empty(), recipe.mixer, recipe.layers, recipe.mixers)
        self.plan: dict[str, Any] = copy.deepcopy(empty.config.linearize)
        self.names = list(surgery.mixer_state(empty))
        """Of all mixers' parameters, in the order of a whole run."""
        self.can_calibrate = any(calibration.can(layer.mixer) for layer in surgery.converted(empty))
        """Whether any mixer has a start in closed form."""
        self.layers_converted = sorted(self._layer_of(path) for path in self.plan["layers"])
        """Numbers of the layers that are."""
        self.width: int = empty.config.get_text_config().hidden_size
        handing = [layer for layer in surgery.converted(empty) if layer.linearize_hands]
        self.hands: int | None = None
        """Number of the layer whose values others mix with theirs."""
        self.value_shape = (0, 0)
        """Heads and width of these."""
        if handing:
            shape = handing[0].mixer.shape
            self.value_shape = (shape.kv_heads, shape.value_dim)
            paths = {id(module): path for path, module in empty.named_modules()}
            self.hands = self._layer_of(paths[id(handing[0])])

    def computing(self) -> AbstractContextManager[Any]:
        """Around passes, as `StageTrainer.computing`."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast, cache_enabled=False)

    def mixing(self, numbers: Iterable[int]) -> bool:
        """Whether any of some layers mixes the first one's values with its own, or hands its own on."""
        return self.hands is not None and any(number >= self.hands for number in numbers)

    def table(self) -> Block:
        """What comes before all layers."""
        model = self.parts.load((), table=True, device=self.device)
        return Block(model, self.parts.layers, range(0))

    def head(self, tuples: bool | None) -> Block:
        """What comes behind all layers."""
        model = self.parts.load((), head=True, device=self.device)
        return Block(model, self.parts.layers, range(0), tuples)

    def block(
        self,
        numbers: range,
        tuples: bool | None,
        stream: Tensor,
        batch: dict[str, Tensor],
        values: Tensor | None,
    ) -> Block:
        """A converted block with the mixers' start.

        Args:
            numbers: of its layers.
            tuples: see `Block`.
            stream: rows [B, T, D] of the stream before it, of which a few are looked at.
            batch, values: see `Block.run`.

        Raises:
            UnsupportedModelError: the converted block is not the untouched one.
            NotFiniteError: the untouched one overflows, or reads more than the stream.
        """
        model = self.parts.load(numbers, device=self.device)
        block = Block(model, self.parts.layers, numbers, tuples)
        own = [path for path in self.plan["layers"] if self._layer_of(path) in numbers]
        honor_softcap(model, self.plan)
        few = {key: value[:ROWS].to(self.device) for key, value in batch.items() if key != "input_ids"}
        stream = stream[:ROWS].to(self.device)
        values = None if values is None else values[:ROWS].to(self.device, stream.dtype)
        with torch.no_grad():  # and in the weights' own precision, as a whole model is held
            untouched, _ = block.run(stream, few)
            check_finite(untouched, f"the residual stream behind {named(numbers)}")
            self._look_at_rotations(block, own, stream)
        # of all layers, in their order, so that the random start is that of a whole run
        set_seed(self.recipe.run.seed)
        linearized(model, copy.deepcopy(self.plan))
        model.eval()
        block.number_layers()
        if own:
            with torch.no_grad():
                with surgery.mode(block, "teacher"):
                    given, _ = block.run(stream, few, values)
                _hold(untouched, given, few, numbers, "in teacher mode")
                with softmax_view(model, surgery.converted(block)), surgery.mode(block, "student"):
                    given, _ = block.run(stream, few, values)
                _hold(untouched, given, few, numbers, "as a softmax over its queries, keys and values")
        return block

    def _look_at_rotations(self, block: Block, paths: list[str], stream: Tensor) -> None:
        modules: list[nn.Module] = [block.whole.get_submodule(path) for path in paths]
        tokens = min(TOKENS, stream.shape[1])
        positions = torch.arange(tokens, device=stream.device)[None]

        def run() -> None:
            block.run(stream[:1, :tokens], {"position_ids": positions})

        found = rotations(block.whole, modules, run) if modules else []
        for path, module, turning in zip(paths, modules, found, strict=True):
            put(self.plan, path, turning)
            with torch.device("meta"):
                mixer = mixer_of(self.plan, path)
            check_rotation(path, module, mixer.shape, mixer)

    def _layer_of(self, path: str) -> int:
        """Number of the layer that a module stands in."""
        return next(n for n, layer in enumerate(self.parts.layers) if path.startswith(f"{layer}."))


def check_finite(values: Tensor, what: str) -> None:
    """Refuse a stream with NaN, which families that hand more than it to their layers give (`Block`).

    Raises:
        NotFiniteError: says what it may come from.
    """
    if not bool(values.isfinite().all()):
        raise NotFiniteError(
            f"{what}: is not finite. The weights overflow in this precision, or the family's layers read more than the "
            "residual stream before them, and then its blocks cannot be taken apart: use linearize run"
        )


def _hold(expected: Tensor, found: Tensor, batch: dict[str, Tensor], numbers: range, view: str) -> None:
    mask = batch.get("attention_mask")
    known = expected.isfinite().all(-1) & (torch.ones_like(expected[..., 0]) if mask is None else mask).bool()
    ours, theirs = expected[known].double(), found[known].double()
    if not ours.numel():
        return
    difference, scale = (ours - theirs).abs().max().item(), ours.abs().max().item()
    if not difference <= tolerance(expected) * scale:
        raise UnsupportedModelError(
            f"{named(numbers)}: differs from the untouched model by {difference:.2g} (the stream reaches {scale:.2g}) "
            f"{view}: its attention depends on more than linearize sees, so it cannot be converted"
        )
