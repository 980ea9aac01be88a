"""Stages compile a model's blocks: norms, rotary embeddings, activations and mixers, fused once for all layers.

A model repeats one block. Its parts read and write the whole text a few times each, and keep it for backward; Inductor
fuses them between the products, and all layers of one mixer share what is compiled ("regional compilation" in torch's
words). In
attention transfer, where a layer's backward pass stands in the middle of its forward pass, only what stands around the
attention is compiled, and functions within it: the rotary embedding and the loss. So it is where the attention asks
other processes for the rest of a sequence. What cannot be compiled runs part by part, with one line in the log.
"""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from linearize import surgery
from linearize.kernels.dispatch import KernelError
from linearize.mixers.compiled import keeping_little
from linearize.patch import changed
from linearize.surgery import LinearizedAttention

log = logging.getLogger(__name__)

ROTARY = "apply_rotary_pos_emb"
"""What the families of transformers call their rotary embedding of queries and keys."""
Place = tuple[Any, str]
"""Where a function is looked up at each call: a module, and the name there."""


class Blocks:
    """Blocks of a student and perhaps its teacher, or parts of them, and their compiled form.

    Args:
        parts: from `repeated` or `around_attention`, and places of functions, each compiled by itself.
        name: of the stage, for the log and for profilers.
        like: blocks of another model, whose compiled form these share.

    Attributes:
        layers, functions: what is compiled.
        obstacle: why they run part by part, or None.
        full: whether torch compiles them for no further size of batch and text.
    """

    def __init__(self, parts: Iterable[nn.Module | Place], name: str, like: Blocks | None = None) -> None:
        self.name = name
        self.layers: list[nn.Module] = []
        self.functions: list[Place] = []
        for part in parts:
            self.layers.append(part) if isinstance(part, nn.Module) else self.functions.append(part)
        self.obstacle: str | None = None if self.layers else "no block repeats"
        self.full = False
        self._calls: dict[tuple[str, ...], Callable[..., Any]] = {} if like is None else like._calls
        self._failed: set[str] = set()

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Inside, blocks run compiled. Masks are to be trusted there (`surgery.trusting`): nobody can look at them."""
        layers = [] if self.obstacle is not None else self.layers
        with ExitStack() as stack:
            for owner, name in self.functions if layers else ():
                own = partial(self._apply, name, getattr(owner, name))
                stack.enter_context(changed(owner, name, own))
            try:
                for layer in layers:
                    layer.forward = partial(self._run, layer)  # type: ignore[method-assign]
                yield
            finally:
                for layer in layers:
                    vars(layer).pop("forward", None)

    def _apply(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A function of `functions`, compiled as long as that works."""
        if name not in self._failed:
            try:
                return self._compiled((name,), _call)(function, *args, **kwargs)
            except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
                if isinstance(error.__cause__, torch.cuda.OutOfMemoryError | KernelError):
                    raise error.__cause__ from error
                self._failed.add(name)
                log.info("stage '%s': %s is not compiled: %s", self.name, name, _said(error))
        return function(*args, **kwargs)

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
                self.obstacle = _said(error)
                log.info("stage '%s': blocks are not compiled, which is slower: %s", self.name, self.obstacle)
        return type(layer).forward(layer, *args, **kwargs)

    def _call_of(self, layer: nn.Module) -> Callable[..., Any]:
        """What layers of this one's mixers share."""
        key = tuple(
            part.mixer.composition for part in layer.modules() if isinstance(part, LinearizedAttention)
        )
        return self._compiled(key, _forward)

    def _compiled(self, key: tuple[str, ...], body: Any) -> Callable[..., Any]:
        if key not in self._calls:
            # torch counts compilations by code object: each stage and mixer gets one of its own
            name = f"block_{self.name}_{len(self._calls)}" if self._calls else f"block_{self.name}"
            own = types.FunctionType(body.__code__.replace(co_name=name), globals(), name)
            self._calls[key] = torch.compile(own, backend=keeping_little, dynamic=False, fullgraph=True)
        return self._calls[key]


def _forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


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


def around_attention(model: nn.Module, *, softmax: bool = False) -> list[nn.Module]:
    """The parts of a model's blocks in which no converted attention stands: norms, feed-forward layers.

    Args:
        model: converted or not.
        softmax: none that is not converted either, where its keys are other processes'.
    """

    def attends(part: nn.Module) -> bool:
        # every attention of transformers knows its layer, for the cache
        return isinstance(part, LinearizedAttention) or (softmax and hasattr(part, "layer_idx"))

    return [
        part
        for layer in repeated(model)
        for part in layer.children()
        if not any(attends(inner) for inner in part.modules())
    ]


def rotary(model: nn.Module) -> list[Place]:
    """The rotary embeddings of a model's converted layers, where their family has one as a function of its own."""
    families = {sys.modules[surgery.family_of(layer)] for layer in surgery.converted(model)}
    return [(family, ROTARY) for family in families if callable(getattr(family, ROTARY, None))]
