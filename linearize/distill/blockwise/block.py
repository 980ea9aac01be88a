"""Some layers of a model as a module of their own, run by the forward pass of the model's own family.

The family's forward makes masks, positions and rotary tables for every layer as ever. Layers before the block hand on
what they get, the block's first one is given the stored residual stream in its place, and the pass ends where the layer
behind the block would begin: what a family does between two layers belongs to the block before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from linearize import surgery
from linearize.surgery import handed_on

INPUTS = ("position_ids", "attention_mask")
"""Of a batch, beside token ids."""


class _Enough(Exception):
    """What was wanted of a pass is there."""


class Block(nn.Module):
    """A block of a model, with the names that its parameters have there.

    Args:
        model: some of whose layers are loaded.
        paths: of all its layers.
        numbers: of the block's; none for what comes before or behind all layers.
        tuples: whether the family's layers give tuples; None: not known, and the block is the first.

    Attributes:
        places, total: which of all `total` converted layers the block's are, in order.
    """

    def __init__(
        self, model: nn.Module, paths: Sequence[str], numbers: range, tuples: bool | None = None
    ) -> None:
        super().__init__()
        self._whole = (model,)  # in a tuple: not a part of this module
        self.config: Any = model.config
        self.numbers, self.tuples = numbers, tuples
        self.paths = [paths[number] for number in numbers]
        layers = [model.get_submodule(path) for path in paths]
        self._ends = (layers[numbers[0]], layers[numbers[-1]]) if len(numbers) else (layers[0], layers[-1])
        self._front, self._back = (layers[0],), (layers[-1],)
        self._behind = tuple(layers[numbers[-1] + 1 : numbers[-1] + 2]) if len(numbers) else ()
        for number, (path, layer) in enumerate(zip(paths, layers, strict=True)):
            if number in numbers:
                self._hang(path, layer)
            else:
                skipped: Any = layer
                skipped.forward = self._skip
        self.places: list[int] = []
        self.total = 0

    @property
    def whole(self) -> Any:
        """The model that the block is of."""
        return self._whole[0]

    def number_layers(self) -> None:
        """Find `places` and `total`, once the model is converted."""
        every = surgery.converted(self.whole)
        own = set(surgery.converted(self))
        self.places = [place for place, layer in enumerate(every) if layer in own]
        self.total = len(every)

    def get_input_embeddings(self) -> None:
        """A block has none."""

    def get_output_embeddings(self) -> None:
        """A block has none."""

    def run(
        self, stream: Tensor, batch: dict[str, Tensor], values: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The stream behind the block.

        Args:
            stream: [B, T, D] before it.
            batch: position_ids [B, T], and attention_mask [B, T] if there is one.
            values: [B, T, N, V] of the first converted layer, where it stands before the block and others mix them.

        Returns:
            The stream [B, T, D] behind the block, and the first converted layer's values where the model hands them on.
        """
        shared: list[Any] = []
        found: list[Tensor] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            first = kwargs.get(handed_on.NAME)
            if first is not None:
                shared.append(first)
                if values is not None:
                    first.put(values)
            return _with_hidden(args, kwargs, stream)

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.tuples = isinstance(output, tuple)
            if not self._behind:
                found.append(output[0] if isinstance(output, tuple) else output)
                raise _Enough

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(_hidden(args, kwargs))
            raise _Enough

        first, last = self._ends
        with ExitStack() as stack:
            stack.callback(first.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(last.register_forward_hook(leave).remove)
            for following in self._behind:
                stack.callback(following.register_forward_pre_hook(begin, with_kwargs=True).remove)
            self._pass(self.whole.base_model, self._nothing(stream), batch)
        return found[0], shared[0].values if shared else None

    def embed(self, ids: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The stream [B, T, D] before all layers, of ids [B, T]; the table has to be loaded."""
        found: list[Tensor] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(_hidden(args, kwargs))
            raise _Enough

        hook = self._front[0].register_forward_pre_hook(enter, with_kwargs=True)
        try:
            self._pass(self.whole.base_model, {"input_ids": ids}, batch)
        finally:
            hook.remove()
        return found[0]

    def finish(self, stream: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Logits [B, T, V] of the stream behind all layers; the head has to be loaded, and the block be empty."""
        answer: Any = (stream,) if self.tuples else stream
        hook = self._back[0].register_forward_hook(lambda module, args, output: answer)
        try:
            logits: Tensor = self._pass(self.whole, self._nothing(stream), batch).logits
        finally:
            hook.remove()
        return logits

    def _pass(self, model: Callable[..., Any], inputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Any:
        try:
            return model(**inputs, **{key: batch.get(key) for key in INPUTS}, use_cache=False)
        except _Enough:
            return None

    def _nothing(self, stream: Tensor) -> dict[str, Tensor]:
        """In place of embeddings; a family that hands them to its layers in another way gives NaN, which is refused."""
        return {"inputs_embeds": stream.new_full((), torch.nan).expand(stream.shape)}

    def _skip(self, *args: Any, **kwargs: Any) -> Any:
        hidden = _hidden(args, kwargs)
        return (hidden,) if self.tuples else hidden

    def _hang(self, path: str, layer: nn.Module) -> None:
        *above, leaf = path.split(".")
        at: nn.Module = self
        for name in above:
            if name not in at._modules:
                at.add_module(name, nn.Module())
            at = at.get_submodule(name)
        at.add_module(leaf, layer)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return hidden


def _with_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor) -> Any:
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": hidden}
    return (hidden, *args[1:]), kwargs
