"""What NCCL would refuse of a collective and gloo lets pass, so that runs on a processor find it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TAKEN = {
    torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float32,
    torch.float64,
}  # fmt: skip
"""Dtypes that it sends; of truth values nothing is added up."""
SPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


class OverNccl(TorchDispatchMode):
    """Inside, every tensor that goes to other processes is contiguous and of a dtype that NCCL knows.

    Attributes:
        seen: collectives that were called, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in SPACES and "wait" not in function.__name__:
            self.seen[function.__name__] = self.seen.get(function.__name__, 0) + 1
            for x in torch.utils._pytree.tree_leaves((args, kwargs)):
                if isinstance(x, Tensor):
                    assert x.is_contiguous(), f"{function}: {tuple(x.shape)} with strides {x.stride()}"
                    assert x.dtype in TAKEN, f"{function}: {x.dtype}"
                    assert x.dtype != torch.bool or "reduce" not in function.__name__, (
                        f"{function}: truth values"
                    )
        return function(*args, **(kwargs or {}))
