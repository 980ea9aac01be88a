"""Weights that are no numbers: found when a model is loaded, not when its loss is."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from linearize.errors import CheckpointError


def check_finite(where: object, model: nn.Module) -> None:
    """Refuse a model with a stored tensor or a rotary frequency that is NaN or infinite; each is read without a copy.

    Args:
        where: what the weights were loaded from, for the message.
        model: loaded; tensors on the meta device (offloaded ones) are left out.

    Raises:
        CheckpointError: names the first such tensor and how many there are.
    """
    # buffers that are not stored may be infinite for good reason, as masks are
    stored = model.state_dict().keys()
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in stored}
    count = len(tensors)
    tensors |= {name: table for name, table in model.named_buffers() if name.endswith("inv_freq")}
    unsound = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point()
        and not tensor.is_meta
        and tensor.numel()
        # both ends are NaN where any element is
        and not all(math.isfinite(float(end)) for part in plain(tensor) for end in part.aminmax())
    ]
    if unsound:
        raise CheckpointError(
            f"the weights of {where} hold NaN or infinite values in {len(unsound)} of {count} tensors (first: "
            f"{unsound[0]}); the training that made them has failed, or the file is damaged: take "
            "another checkpoint, or fetch it again"
        )


def plain(tensor: Tensor) -> Iterator[Tensor]:
    """The floating tensors that a tensor is made of: itself, or codes and scales where it is quantized."""
    tensor = tensor.detach()
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain(getattr(tensor, name))
    elif tensor.is_floating_point() and tensor.numel():
        yield tensor if tensor.element_size() > 1 else tensor.to(torch.float32)  # no operator reads float8


LARGEST = 1.8e19
"""What float32 can square: norms, losses and gradients of anything larger are infinite."""


def check_trainable(where: object, model: nn.Module) -> None:
    """Refuse a model with weights that are numbers, and too large to train beside; their loss would say it steps later.

    Args:
        where: what the weights were loaded from, for the message.
        model: loaded, and `check_finite`.

    Raises:
        CheckpointError: names the first such tensor.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.is_meta or not parameter.numel():
            continue
        largest = max(abs(float(end)) for end in parameter.detach().aminmax())
        if largest > LARGEST:
            raise CheckpointError(
                f"the weights of {where} reach {largest:.3g} in {name}, and float32 cannot square more than "
                f"{LARGEST:g}: the training that made them has failed, or the file is damaged; take another checkpoint "
                "or fetch it again"
            )
