"""Stages compile a model's blocks: norms, rotary embeddings, activations and mixers, fused once for all layers.

A model repeats one block. Its parts read and write the whole text a few times each, and keep it for backward; Inductor
fuses them between the products, and all layers of one mixer share what is compiled ("regional compilation" in torch's
words). In
attention transfer, where a layer's backward pass stands in the middle of its forward pass, only what stands around the
attention is compiled. What cannot be compiled runs part by part, with one line in the log.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from linearize.kernels.dispatch import KernelError
from linearize.mixers.compiled import keeping_little
from linearize.surgery import LinearizedAttention

log = logging.getLogger(__name__)


class Blocks:
    """Blocks of a student and perhaps its teacher, or parts of them, and their compiled form.

    Args:
        layers: from `repeated` or `around_attention`.
        name: of the stage, for the log and for profilers.
        like: blocks of another model, whose compiled form these share.

    Attributes:
        layers: what is compiled.
        obstacle: why they run part by part, or None.
        full: whether torch compiles them for no further size of batch and text.
    """

    def __init__(self, layers: Iterable[nn.Module], name: str, like: Blocks | None = None) -> None:
        self.name = name
        self.layers = list(layers)
        self.obstacle: str | None = None if self.layers else "no block repeats"
        self.full = False
        self._calls: dict[tuple[str, ...], Callable[..., Any]] = {} if like is None else like._calls

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Inside, blocks run compiled. Masks are to be trusted there (`surgery.trusting`): nobody can look at them."""
        layers = [] if self.obstacle is not None else self.layers
        try:
            for layer in layers:
                layer.forward = partial(self._run, layer)  # type: ignore[method-assign]
            yield
        finally:
            for layer in layers:
                vars(layer).pop("forward", None)

    def _run(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        if self.obstacle is None:
            try:
                return self._call_of(layer)(layer, *args, **kwargs)
            except torch._dynamo.exc.FailOnRecompileLimitHit:
                # sizes that are compiled stay so
                if not self.full:
                    log.info(
                        "stage '%s': blocks are compiled for no more sizes; others are slower", self.name
                    )
                self.full = True
            except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
                if isinstance(error.__cause__, torch.cuda.OutOfMemoryError | KernelError):
                    raise error.__cause__ from error
                self.obstacle = " ".join(str(error).split())[:200] or type(error).__name__
                log.info("stage '%s': blocks are not compiled, which is slower: %s", self.name, self.obstacle)
        return type(layer).forward(layer, *args, **kwargs)

    def _call_of(self, layer: nn.Module) -> Callable[..., Any]:
        """What layers of this one's mixers share."""
        key = tuple(
            part.mixer.composition for part in layer.modules() if isinstance(part, LinearizedAttention)
        )
        if key not in self._calls:

            def block(layer: Any, *args: Any, **kwargs: Any) -> Any:
                return type(layer).forward(layer, *args, **kwargs)

            # torch counts compilations by code object: each stage and mixer gets one of its own
            name = f"block_{self.name}_{len(self._calls)}" if self._calls else f"block_{self.name}"
            own = types.FunctionType(block.__code__.replace(co_name=name), globals(), name)
            self._calls[key] = torch.compile(own, backend=keeping_little, dynamic=False, fullgraph=True)
        return self._calls[key]


def repeated(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model: the members of its longest list of modules of one class, at least two.

    None where somebody has replaced a block's forward, or listens inside: torch leaves hooks out of what layers share.
    """
    lists = [list(part) for part in model.modules() if isinstance(part, nn.ModuleList)]
    found = [part for part in lists if len(part) > 1 and len({type(layer) for layer in part}) == 1]
    layers = max(found, key=len, default=[])
    taken = any("forward" in vars(layer) for layer in layers)
    heard = any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks
        for layer in layers
        for part in layer.modules()
    )
    return [] if taken or heard else layers


def around_attention(model: nn.Module) -> list[nn.Module]:
    """The parts of a model's blocks in which no converted attention stands: norms, feed-forward layers."""
    return [
        part
        for layer in repeated(model)
        for part in layer.children()
        if not any(isinstance(inner, LinearizedAttention) for inner in part.modules())
    ]
