"""CUDA graphs without a card: what a call launches, taken down once and run again without its Python.

As in a graph, every operation reads and writes the tensors that it did while it was recorded, recording computes
nothing, numbers of the host stay what they were, and a look at the device fails. Unlike a graph, nothing is reused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import import_utils

from linearize.distill import captured as captured_module
from linearize.distill import passes as passes_module
from linearize.distill.captured import Captured
from linearize.patch import changed

LOOKS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")
COPIES = ("tolist", "item", "cpu", "numpy", "__array__")
"""Methods that bring numbers to the host; of a tensor that is there already, no operation tells."""


class _Watching(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in COPIES:
            raise RuntimeError(f"{function.__name__} copies from the device")
        return function(*args, **(kwargs or {}))


class _Listing(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []
        self._own: dict[int, Any] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket.__name__ in LOOKS:
            raise RuntimeError(f"{function} looks at the device")
        for place, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[place] if place < len(args) else kwargs.get(argument.name)
                for x in tree_leaves(given):
                    self._keep(x)
        made = function(*args, **kwargs)
        for x in tree_leaves(made):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if all(
                    not isinstance(y, Tensor) or y.untyped_storage()._cdata != storage._cdata
                    for y in tree_leaves((args, kwargs))
                ):
                    self._own[storage._cdata] = storage  # held, so that no other one gets its address
        self.calls.append((function, args, kwargs, made))
        return made

    def _keep(self, x: Any) -> None:
        if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self._own:
            self.before.append((x, x.detach().clone()))


class Graph:
    """What was recorded.

    Attributes:
        replays: how often it has run.
    """

    def __init__(self, calls: list[tuple[Any, tuple, dict, Any]]) -> None:
        self.calls, self.replays = calls, 0

    @torch.no_grad()
    def replay(self) -> None:
        """All operations once more, into the tensors that they have made before."""
        self.replays += 1
        for function, args, kwargs, made in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)


def record(call: Callable[[], Any]) -> tuple[Graph, Any]:
    """In the place of `linearize.recording.record`."""
    random, listing = torch.get_rng_state(), _Listing()
    try:
        # transformers asks for it, and does other things
        with listing, _Watching(), changed(import_utils, "is_cuda_stream_capturing", lambda: True):
            made = call()
    finally:
        torch.set_rng_state(random)
        with torch.no_grad():
            for x, value in reversed(listing.before):
                x.copy_(value)
    return Graph(listing.calls), made


def on_cpu(monkeypatch: Any) -> None:
    """Stages on the CPU record their micro-steps, in this module's sense."""

    def aside(self: Captured, run: Any, batch: Any, count: Any) -> Tensor:
        losses = run(batch, count)
        self._receivers = [p for p in self.parameters if p.grad is not None]
        return losses

    monkeypatch.setattr(captured_module, "record", record)
    monkeypatch.setattr(Captured, "_aside", aside)
    monkeypatch.setattr(
        passes_module, "_obstacle", lambda run, device: None if run.capture else "not asked for"
    )
