"""Keys as codes: softmax over as many keys as a codebook has (Transformer-VQ, Lingle 2023, arXiv 2309.16354)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.mixers import fits
from linearize.mixers.base import LayerShape, Part, wide
from linearize.mixers.feature_map import FEATURE_MAPS, FeatureMap
from linearize.mixers.feature_map.shared import exponential
from linearize.mixers.options import WIDEST, number
from linearize.mixers.statistics import Statistics


@FEATURE_MAPS.register("codes")
class Codes(FeatureMap):
    """phi(k) says which of C codes lies nearest k, phi(q)_c = exp(scaling q.c) is the softmax's weight on code c.

    So phi(q).phi(k) is softmax's own weight on the code in the place of the key, and beside a window under a shared
    normalizer on one scale (`stabilized`, `complement`, a weight of one half) the layer is softmax attention whose keys
    behind the window are rounded to codes. Codes are of each key-value head; k-means over the teacher's keys sets them.
    Gradients pass the choice as if it were the softmax of the negative squared distances (straight-through).

    Limitations: the paper moves codes by averages of their keys and has a loss for keys that lie far; here codes train
    like other parameters. Exponents are cut at +-60. The teacher's soft cap on scores is left out.
    """

    @dataclass
    class Config(Part.Config):
        dim: int = number(128, least=1, most=WIDEST)
        """C; at most 256 run on the GPU's kernels."""

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.feature_dim, self.scaling = config.dim, shape.scaling
        self.codes = nn.Parameter(torch.empty(shape.kv_heads, config.dim, shape.key_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if not getattr(self.codes, "_is_hf_initialized", False):
            nn.init.normal_(self.codes)

    def starts(self, statistics: Statistics) -> list[dict[str, Tensor]]:
        """Centers of the teacher's keys, the mean first key of a text among them (see `fits.prototypes`)."""
        made = []
        for head in range(statistics.k.shape[1]):
            keys = statistics.k[:, head]
            made.append(fits.prototypes(keys, keys[statistics.opens].mean(0), self.feature_dim))
        return [{"codes": torch.stack(made)}]

    def query(self, q: Tensor, position: Tensor | None = None) -> Tensor:
        grouped = q.unflatten(2, (len(self.codes), -1))
        scores = wide(torch.einsum("btngk,nck->btngc", grouped, self.codes.to(q.dtype)))
        return exponential(self.scaling * scores, less_maximum=False).flatten(2, 3)

    def key(self, k: Tensor, position: Tensor | None = None) -> Tensor:
        codes = self.codes.to(k.dtype)
        near = 2 * wide(torch.einsum("btnk,nck->btnc", k, codes)) - wide(codes).square().sum(-1)
        soft = (self.scaling * near).softmax(-1)
        hard = F.one_hot(near.argmax(-1), self.feature_dim).to(soft.dtype)
        return hard + (soft - soft.detach())
