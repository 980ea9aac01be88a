"""Ways in which families turn queries and keys to their places, and how each is taken back.

All turn pairs of dims of a head by angles that grow with the token's place. They differ in which dims are a pair, in
which end of the head has them, in the sense of the turn, and in how cosines and sines are written down for the layer.
A way's name says where it leaves the first one, `half`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearize.mixers.base import accumulator

HALF = "half"
"""The way of Llama, Qwen, Gemma, Phi, GPT-NeoX and their like, on the whole head or its first dims."""


STILL = 1e-3
"""Tangent of the largest angle that a token at place 0 is turned by."""


@dataclass(frozen=True)
class Way:
    """One way of turning.

    Attributes:
        pairs: `half`: dim i and the one half a width behind it; `pairs`: neighbours (Cohere, GLM, Llama 4).
        tables: how the layer is handed a pair's numbers: `twice`, in both halves of cos and sin; `each`, at both
            neighbours (Cohere); `once` (GPT-OSS); `complex`, as one number (Llama 4, DeepSeek-V2).
        last: the last dims of a head are turned, not the first (latent attention).
        backwards: by the opposite angle (nanochat).
    """

    pairs: str = "half"
    tables: str = "twice"
    last: bool = False
    backwards: bool = False

    @property
    def name(self) -> str:
        told = [self.pairs, *([] if self.tables == "twice" else [self.tables])]
        return "-".join(told + ["last"] * self.last + ["backwards"] * self.backwards)

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor, over: Tensor | float = 1.0) -> Tensor:
        """x [..., K] with its first or last pairs of dims turned.

        Args:
            x: queries or keys.
            cos, sin: [..., P], spread over the axes of `x`, of P pairs.
            over: what the turned are divided by; [..., P] likewise.
        """
        width = 2 * cos.shape[-1]
        start = x.shape[-1] - width if self.last else 0
        before, own, behind = x[..., :start], x[..., start : start + width], x[..., start + width :]
        a, b = own.chunk(2, -1) if self.pairs == "half" else (own[..., ::2], own[..., 1::2])
        made = ((a * cos - b * sin) / over, (b * cos + a * sin) / over)
        own = torch.cat(made, -1) if self.pairs == "half" else torch.stack(made, -1).flatten(-2)
        return torch.cat([before, own, behind], -1) if width < x.shape[-1] else own


WAYS: dict[str, Way] = {
    way.name: way
    for way in itertools.starmap(
        Way,
        itertools.product(
            ("half", "pairs"), ("twice", "each", "once", "complex"), (False, True), (False, True)
        ),
    )
}
"""Name, as `LayerShape.rotary` and checkpoints have it -> way; `half` first."""


def angles(way: Way, rotation: Any) -> tuple[Tensor, Tensor] | None:
    """cos and sin [B or 1, T, P] of P pairs, times the factor that YaRN and the like put on them.

    Args:
        way: of the layer.
        rotation: what the layer is handed.

    Returns:
        None where that does not have the way's form.
    """
    if way.tables == "complex":
        if not (isinstance(rotation, Tensor) and rotation.is_complex() and rotation.dim() == 3):
            return None
        cos, sin = rotation.real, rotation.imag
    else:
        if not is_pair(rotation) or rotation[0].dim() != 3:
            return None
        cos, sin = rotation
        if way.tables != "once":
            if cos.shape[-1] % 2:
                return None
            half = cos.shape[-1] // 2
            which = slice(0, half) if way.tables == "twice" else slice(0, None, 2)
            cos, sin = cos[..., which], sin[..., which]
    return (cos, -sin) if way.backwards else (cos, sin)


def is_pair(rotation: Any) -> bool:
    """Whether this is cos and sin."""
    return (
        isinstance(rotation, (tuple, list))
        and len(rotation) == 2
        and all(isinstance(x, Tensor) and not x.is_complex() for x in rotation)
    )


def candidates(rotation: Any, key_dim: int) -> Iterator[str]:
    """Names of the ways that a layer may turn, `half` first, as what it was handed for places from 0 on tells.

    Pairs that turn slowly show little in a few tokens, so the numbers have to be written down as the way has it: the
    first half of a table that has each pair once would turn what is seen, and leave the rest.

    Args:
        rotation: what it was handed.
        key_dim: width of its heads.
    """
    for name, way in WAYS.items():
        found = angles(way, rotation)
        if found is None or 2 * found[0].shape[-1] > key_dim or not _is_written(way, rotation):
            continue
        if way.last and 2 * found[0].shape[-1] == key_dim:
            continue  # first and last are the same dims
        cos, sin = (table[:, 0].float() for table in found)
        if bool((sin.abs() <= STILL * cos.abs()).all()):  # or it is sin and cos
            yield name


def _is_written(way: Way, rotation: Any) -> bool:
    """Whether both copies of a table are the same."""
    if way.tables == "twice":
        return all(torch.equal(*x.chunk(2, -1)) for x in rotation)
    return way.tables != "each" or all(torch.equal(x[..., ::2], x[..., 1::2]) for x in rotation)


def rotate_back(x: Tensor, rotation: Any, name: str = HALF) -> Tensor:
    """Undo a rotary embedding.

    A pair (a, b) was turned to (a cos - b sin, b cos + a sin); the inverse is the turn by the opposite angle, over the
    square of the factor that YaRN and the like put on cos and sin.

    Args:
        x: [B, T, H, K], rotated.
        rotation: as transformers hands it to attention modules: cos and sin [B or 1, T, R], or complex [B or 1, T, P].
        name: of the way.

    Returns:
        [B, T, H, K] before the rotation, in float32 or wider.
    """
    way = WAYS[name]
    found = angles(way, rotation)
    assert found is not None, "the way was found by a rotation of this form"
    x = x.to(accumulator(x.dtype))
    cos, sin = (table[:, :, None].to(x.dtype) for table in found)
    return way.turned(x, cos, -sin, cos.square() + sin.square())
