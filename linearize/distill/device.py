"""Where a run computes and in what precision: what `run.device`, `precision` and `weights` mean on this machine."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize import launched
from linearize.config.schema import RunConfig
from linearize.errors import LinearizeError


def resolved(
    run_config: RunConfig, errors: list[LinearizeError]
) -> tuple[torch.device, torch.dtype | None, torch.dtype]:
    """Device, autocast dtype and dtype of what does not train.

    Args:
        run_config: what was asked for.
        errors: receives what cannot be had here, so that it is told with all else; the CPU then stands in for it.

    Raises:
        LinearizeError: in one of several processes, which have to agree before they can talk.
    """
    try:
        device = resolve_device(run_config)
        return device, resolve_precision(run_config, device), resolve_weights(run_config, device)
    except LinearizeError as error:
        if launched.several():
            raise
        errors.append(error)
        return torch.device("cpu"), None, torch.float32


def resolve_device(run_config: RunConfig) -> torch.device:
    """The device that `run.device` means here; of several processes each has a card of its own.

    Raises:
        LinearizeError: cuda was asked for and is not there, or there are more processes than cards.
    """
    if run_config.device == "cuda" and not torch.cuda.is_available():
        raise LinearizeError(
            "run.device: cuda was asked for, but torch sees no CUDA device: use run.device=cpu"
        )
    kind = run_config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return _own_card() if kind == "cuda" and launched.several() else torch.device(kind)


def _own_card() -> torch.device:
    cards = torch.cuda.device_count()
    if launched.local() >= cards:
        raise LinearizeError(
            f"process {launched.local()} of this machine has no card of its own, torch sees {cards}: start at most "
            f"{cards} (torchrun --nproc-per-node {cards}), or use run.device=cpu"
        )
    device = torch.device("cuda", launched.local())
    torch.cuda.set_device(device)
    return device


def resolve_precision(run_config: RunConfig, device: torch.device) -> torch.dtype | None:
    """Autocast dtype of the passes, or None for float32 throughout."""
    if run_config.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    return torch.bfloat16 if run_config.precision == "bf16" else None


def resolve_weights(run_config: RunConfig, device: torch.device) -> torch.dtype:
    """Dtype of the weights that do not train.

    Raises:
        LinearizeError: bfloat16 weights for passes in float32, which would not multiply with float32 masters.
    """
    passes = resolve_precision(run_config, device)
    if run_config.weights == "auto":
        return torch.bfloat16 if passes is not None and device.type == "cuda" else torch.float32
    if run_config.weights == "bfloat16" and passes is None:
        raise LinearizeError(
            f"run.weights: bfloat16 needs bfloat16 passes, and run.precision={run_config.precision} means float32 on "
            f"{device.type}: set run.precision=bf16, or run.weights=float32"
        )
    return torch.bfloat16 if run_config.weights == "bfloat16" else torch.float32


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device, without the host waiting until the device has come so far."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
