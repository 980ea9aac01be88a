"""The additive rule of linear attention: S += phi(k) v^T, z += phi(k) (Katharopoulos et al. 2020, eq. 18-20)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.kernels.linear import linear_chunk, linear_read, linear_reference, linear_write
from linearize.mixers.base import Part, Partial
from linearize.mixers.state import State
from linearize.mixers.update import UPDATES, Update


@UPDATES.register("additive")
class Additive(Update):
    """Sums of outer products [B, M, F, V] and of features [B, M, F], both float32 or wider."""

    @dataclass
    class Config(Part.Config):
        pass

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        size = (batch, self.heads, self.feature_dim)
        return {
            "sums": torch.zeros(*size, self.value_dim, dtype=dtype, device=device),
            "norms": torch.zeros(*size, dtype=dtype, device=device),
        }

    def parallel(self, phi_q: Tensor, phi_k: Tensor, v: Tensor | None, visible: Tensor) -> Partial:
        return Partial(*linear_reference(phi_q, phi_k, v, visible))

    def chunked(self, phi_q: Tensor, phi_k: Tensor, v: Tensor, docs: Tensor, state: State) -> Partial:
        before = state["sums"], state["norms"]
        numerator, denominator, (sums, norms) = linear_chunk(phi_q, phi_k, v, docs, before)
        state.write({"sums": sums, "norms": norms})
        return Partial(numerator, denominator)

    def step(self, phi_q: Tensor, phi_k: Tensor, v: Tensor, state: State) -> Partial:
        linear_write(phi_k[:, 0], v[:, 0], state["sums"], state["norms"])
        numerator, denominator = linear_read(phi_q[:, 0], state["sums"], state["norms"])
        return Partial(numerator[:, None], denominator[:, None])
