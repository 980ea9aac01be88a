"""The norm of each head's output, wherever a composition has it, and how its scale and epsilon move elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.export.layouts.difference import Difference, Section, said
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


def quotient(eps: float, other: float) -> float:
    """Of two epsilons; one where they are one number, written in float32 somewhere on the way (GGUF files do)."""
    return 1.0 if math.isclose(eps, other, rel_tol=1e-6) else eps / other


def head_norm(mixer: Section) -> HeadNorm | None:
    """The norm behind a rule, whatever the output does with it then; None where there is none, or more than one."""
    normalizer, output = mixer["normalizer"], mixer["output"]["name"]
    if normalizer["name"] == "group_norm" and output in ("none", "gate"):
        place = "recurrent.normalizer.scale" if normalizer["scale"] else None
        return HeadNorm(GroupNorm.EPSILON, place, normalizer["kind"] == "layer")
    if normalizer["name"] == "none" and output == "norm":
        return HeadNorm(OutputNorm.EPSILON, "output.scale")
    return None


def norm_differences(mixer: Section) -> Iterator[Difference]:
    """What keeps a composition's norm and gate from being an RMS norm of each head, with or without fla's SiLU gate."""
    norm, normalizer, output = head_norm(mixer), mixer["normalizer"]["name"], mixer["output"]["name"]
    theirs = "an RMS norm of each head"
    if normalizer not in ("none", "group_norm") or (norm is not None and norm.centered):
        yield Difference("normalizer", said(mixer, "normalizer"), theirs)
    elif normalizer == "none" and output not in ("norm", "gated_norm"):
        yield Difference("normalizer", "none", theirs)
    if output == "gate":
        yield Difference("output", "a gate 1 + sigmoid(x W1) W2", "none, or a gate SiLU(x G)")
    elif output == "gated_norm":
        yield Difference("output", said(mixer, "output"), f"{theirs}, or one under SiLU(x G)")
    elif output != "none" and normalizer != "none":
        yield Difference("output", said(mixer, "output"), "none behind a norm")


def scales(norm: HeadNorm, parts: dict[str, Tensor], heads: int, dim: int) -> Tensor:
    """The norm's scale of every head and dim, [H V], float64."""
    if norm.place is None:
        return torch.ones(heads * dim, dtype=torch.float64)
    scale = parts[norm.place].double()
    return (scale if scale.dim() == 2 else scale[:, None]).expand(heads, dim).reshape(-1)
