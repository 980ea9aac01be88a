"""A teacher in the machine's memory, whose blocks are on the device while they compute, and the next one on its way.

The device holds two blocks, embeddings and head. On CUDA copies come from pinned memory on a stream of their own, so
that they run beside the products of the block before (Rajbhandari et al. 2021, arXiv 2104.07857).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linearize.distill.shards import blocks

ATTRIBUTE = "linearize_lent"


def lend(model: nn.Module, device: torch.device) -> None:
    """Keep a frozen model's blocks where they are, and bring each to the device for its forward pass.

    Args:
        model: on the CPU, frozen; changed in place. Its blocks run in their order.
        device: where it computes.
    """
    found = [_Block(block, device) for block in blocks(model)]
    own = {id(tensor) for block in found for tensor in block.tensors}
    for part in model.modules():
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None and id(tensor) not in own:
                tensor.data = tensor.data.to(device)
    for block, following in zip(found, found[1:] + found[:1], strict=True):
        block.following = following
    setattr(model, ATTRIBUTE, found)


def is_lent(model: nn.Module | None) -> bool:
    """Whether `lend` has been at it."""
    return model is not None and hasattr(model, ATTRIBUTE)


class _Block:
    """One block and its two homes.

    Attributes:
        following: the block that is fetched while this one computes.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.device = device
        self.following: _Block = self
        self.tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
        self.home = [self._kept(tensor.data) for tensor in self.tensors]
        self._settle()
        self._fetched: list[Tensor] | None = None
        self._ready: Any = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        module.register_forward_pre_hook(self._arrive)
        module.register_forward_hook(self._leave)

    def _kept(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def _settle(self) -> None:
        for tensor, kept in zip(self.tensors, self.home, strict=True):
            tensor.data = kept

    def fetch(self) -> None:
        """Begin to copy, unless that has been done."""
        if self._fetched is not None:
            return
        if self._stream is None:
            self._fetched = [tensor.to(self.device, copy=True) for tensor in self.home]
            return
        # memory of the block before the last may still be read by what has been launched
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self._fetched = [tensor.to(self.device, non_blocking=True) for tensor in self.home]
            self._ready = self._stream.record_event()

    def _arrive(self, *_: Any) -> None:
        self.fetch()
        assert self._fetched is not None
        if self._ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(self._ready)
            for tensor in self._fetched:
                tensor.record_stream(current)
        for tensor, here in zip(self.tensors, self._fetched, strict=True):
            tensor.data = here
        self.following.fetch()

    def _leave(self, *_: Any) -> None:
        self._fetched = None
        self._settle()
