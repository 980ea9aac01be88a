"""Whether two ways to compute one function agree, by as much as the numbers that they are given leave open."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from compositions import Draw, make
from torch import Tensor

from linearize.mixers.base import LayerShape

UNIT = 2.0**-23
"""Of float32: a number is held to half of it."""


def close(
    out: Tensor, expected: Tensor, tolerance: float = 1e-10, moved: Callable[[], Tensor] | None = None
) -> None:
    """Equal to `tolerance` of the largest value, or of one if that is smaller; `moved` is what rounding adds to it."""
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    apart, allowed = (out - expected).abs(), tolerance * scale
    if moved is not None and bool((apart > allowed).any()):
        allowed = allowed + 10 * moved()
    wrong = ~(apart <= allowed)
    assert not wrong.any(), (apart.max().item(), wrong.nonzero()[:5].tolist(), f"largest value {scale}")


def moves(mixer: dict, shape: LayerShape, x: Draw, **masks: Tensor) -> Callable[[], Tensor] | None:
    """`moved` of a call in float32; none in float64, where cases are held to far less."""
    return None if x.q.dtype == torch.float64 else partial(moved, mixer, shape, x, **masks)


def moved(mixer: dict, shape: LayerShape, x: Draw, **masks: Tensor) -> Tensor:
    """[B, T, H, 1]: how far a head's output moves where each input moves by a rounding of float32, in float64.

    Two orders of the same sums may be as far apart. Mostly that is a ten-millionth of the largest value; a norm that
    divides by what nearly cancels, behind a decay that has forgotten nearly everything, makes a hundred times as much.
    """
    made, x = make(mixer, shape, x.q.dtype).double(), x.apply(Tensor.double)
    generator, found = torch.Generator().manual_seed(7), []
    with torch.no_grad():
        exact = x.run(made.parallel, **masks)
        for _ in range(3):
            near = x.apply(lambda y: y * (1 + UNIT * (2 * torch.rand(y.shape, generator=generator) - 1)))
            found.append((near.run(made.parallel, **masks) - exact).abs().amax(-1, keepdim=True))
    return torch.stack(found).amax(0)
