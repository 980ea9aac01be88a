"""The norm of each head's output, wherever a composition has it, and how its scale and epsilon move elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.export.layouts.difference import Section
from linearize.mixers.normalizer.group_norm import GroupNorm
from linearize.mixers.output.norm import OutputNorm


@dataclass(frozen=True)
class HeadNorm:
    """y / sqrt(mean(y^2) + eps), the mean over a head's dims.

    Attributes:
        eps: epsilon.
        place: name of the parameter that holds its scale, [H] or [H, V]; None: no scale.
        centered: less its mean first (a layer norm).
    """

    eps: float
    place: str | None
    centered: bool = False


def head_norm(mixer: Section) -> HeadNorm | None:
    """The one norm of a composition; None where there is none, or more than one, or something else besides."""
    normalizer, output = mixer["normalizer"], mixer["output"]["name"]
    if normalizer["name"] == "group_norm" and output in ("none", "gate"):
        place = "recurrent.normalizer.scale" if normalizer["scale"] else None
        return HeadNorm(GroupNorm.EPSILON, place, normalizer["kind"] == "layer")
    if normalizer["name"] == "none" and output == "norm":
        return HeadNorm(OutputNorm.EPSILON, "output.scale")
    return None


def scales(norm: HeadNorm, parts: dict[str, Tensor], heads: int, dim: int) -> Tensor:
    """The norm's scale of every head and dim, [H V], float64."""
    if norm.place is None:
        return torch.ones(heads * dim, dtype=torch.float64)
    scale = parts[norm.place].double()
    return (scale if scale.dim() == 2 else scale[:, None]).expand(heads, dim).reshape(-1)
