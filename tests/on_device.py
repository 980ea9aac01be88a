"""The meta device, where tensors have no data: what would look at some raises, and no CUDA graph could hold it."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
COPIES = ("_to_copy", "copy_")


class OnDevice(TorchDispatchMode):
    """Every tensor of every operation is on the meta device, numbers apart."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.seen.add(function.namespace)
        flat, _ = torch.utils._pytree.tree_flatten((args, kwargs, made))
        for x in flat:
            assert not isinstance(x, torch.Tensor) or x.device == META or not x.dim(), (
                f"{function}: {x.device}"
            )
        if function.overloadpacket.__name__ in COPIES:
            # a number of the host is an argument of a kernel; one that is copied is not
            places = {x.device for x in flat if isinstance(x, torch.Tensor)}
            assert len(places) == 1, f"{function} copies between {places}"
        return made


def to_meta(module: nn.Module) -> None:
    for part in module.modules():
        for name, x in part._parameters.items():
            if x is not None:
                part._parameters[name] = nn.Parameter(x.to(META), requires_grad=False)
        for name, x in part._buffers.items():
            if x is not None:
                part._buffers[name] = x.to(META)


def no_autocast(monkeypatch) -> None:
    """Mixers switch autocast off, for which the meta device has no name."""
    own = torch.autocast
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *a, **k: nullcontext() if kind == "meta" else own(kind, *a, **k)
    )
