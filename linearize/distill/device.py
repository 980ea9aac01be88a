"""Where a run computes and in what precision: what `run.device`, `precision` and `weights` mean on this machine."""

from __future__ import annotations

import os

import torch

from linearize.config.schema import RunConfig
from linearize.errors import LinearizeError


def resolve_device(run_config: RunConfig) -> torch.device:
    """The device that `run.device` means here.

    Raises:
        LinearizeError: cuda was asked for and is not there, or several processes were started.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LinearizeError(
            f"{os.environ['WORLD_SIZE']} processes were started (torchrun?), but a run uses one process and one "
            "device: start it without a launcher"
        )
    if run_config.device == "cuda" and not torch.cuda.is_available():
        raise LinearizeError(
            "run.device: cuda was asked for, but torch sees no CUDA device: use run.device=cpu"
        )
    if run_config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(run_config.device)


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
