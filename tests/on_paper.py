"""Running a model on fake tensors of the meta device, as on a GPU: shapes, dtypes and kernels, but no numbers."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from linearize.kernels import dispatch

META = torch.device("meta")
# as wide as the kernels take, and small otherwise; xatl converts all but every twelfth layer
SIZES = {"hidden_size": 64, "head_dim": 64, "num_hidden_layers": 2}


class OnDevice(TorchDispatchMode):
    """Every tensor of every operation is on the meta device, numbers apart."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves((args, kwargs, made)):
            assert not isinstance(x, torch.Tensor) or x.device == META or not x.dim(), (
                f"{function}: {x.device}"
            )
        return made


@contextmanager
def on_paper(monkeypatch, triton: bool):
    """Fake tensors, and the dispatch as on a CUDA device, or as without kernels."""
    own = torch.autocast
    with monkeypatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True) as mode:
        patch.setenv("LINEARIZE_COMPILE", "never")
        patch.setattr(dispatch, "use_triton", lambda *x: triton)
        # the meta device has no name for autocast
        patch.setattr(torch, "is_autocast_enabled", lambda *kind: False)
        patch.setattr(
            torch, "autocast", lambda kind, *a, **k: nullcontext() if kind == "meta" else own(kind, *a, **k)
        )
        yield mode


def to_paper(model: nn.Module) -> None:
    for part in model.modules():
        for name, x in list(part._parameters.items()):
            if x is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(x, device=META), requires_grad=True)
        for name, x in list(part._buffers.items()):
            if x is not None:
                part._buffers[name] = torch.empty_like(x, device=META)
