"""Positive orthogonal random features of the softmax kernel (Choromanski et al. 2021, arXiv 2009.14794, lemma 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.mixers.base import LayerShape, Part, fill, wide
from linearize.mixers.feature_map import FEATURE_MAPS
from linearize.mixers.feature_map.shared import ParameterFree, exponential
from linearize.mixers.options import WIDEST, choice_problems, number


@FEATURE_MAPS.register("performer")
class Performer(ParameterFree):
    """phi(x) = exp(R x - |x|^2 / 2) / sqrt(dim), x times the square root of the teacher's scaling; F = dim.

    In the mean over R, phi(q).phi(k) = exp(scaling q.k): the teacher's own weight, without training. R [dim, K] has
    rows of standard normal length, orthogonal in blocks of K. It is drawn once from `seed`, the same for every head
    and layer, is never trained, and is saved with the checkpoint, so that every form and every reload agree.

    A running-sum normalizer cancels the query's row maximum, which is taken off by default; ``less_maximum: none``
    keeps the estimate itself, for a normalizer that is shared with a window's exponentials.

    Limitations: the variance grows as exp of the squared lengths of q and k, so long keys need many features, and
    Hedgehog (arXiv 2402.04347) finds converted models poor with it (24.7 of 58.8 on CoLA). The paper redraws R while
    training; here it is fixed. Exponents are cut at +-60, so that float32 sums do not overflow.

    Args:
        config: see `Config`.
        shape: the layer's numbers.
    """

    projection: Tensor

    @dataclass
    class Config(Part.Config):
        dim: int = number(256, least=1, most=WIDEST)
        """Random features, F."""
        seed: int = number(0, least=0, most=2**32 - 1)
        """Draws R."""
        less_maximum: str = "query"
        """query = queries less their row maximum; none."""

        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            return choice_problems(less_maximum=(self.less_maximum, ("query", "none")))

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.config, self.feature_dim = config, config.dim
        self.root_scaling = math.sqrt(shape.scaling)
        self.register_buffer("projection", torch.empty(config.dim, shape.key_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fill(self.projection, orthogonal_rows(*self.projection.shape, seed=self.config.seed))

    def query(self, q: Tensor, position: Tensor | None = None) -> Tensor:
        return exponential(self._exponent(q), less_maximum=self.config.less_maximum == "query") * self._norm

    def key(self, k: Tensor, position: Tensor | None = None) -> Tensor:
        return exponential(self._exponent(k), less_maximum=False) * self._norm

    @property
    def _norm(self) -> float:
        return self.feature_dim**-0.5

    def _exponent(self, x: Tensor) -> Tensor:
        x = wide(x) * self.root_scaling
        return x @ self.projection.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2


def orthogonal_rows(rows: int, width: int, *, seed: int) -> Tensor:
    """Rows [rows, width] of uniform direction and standard normal length, orthogonal in blocks of `width`.

    Drawn on the CPU in float64 whatever the default device, so that a model built on the meta device gets the same.
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device="cpu", dtype=torch.float64)

    blocks = []
    for _ in range(-(-rows // width)):
        basis, triangle = torch.linalg.qr(normal(width, width))
        # LAPACK's signs would favor some directions
        blocks.append((basis * triangle.diagonal().sign()).T)
    lengths = normal(rows, width).norm(dim=1)
    return torch.cat(blocks)[:rows] * lengths[:, None]
