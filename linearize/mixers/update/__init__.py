"""Update rules of the recurrent branch: features of q and k, and values -> Partial and state; one file each."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from linearize.mixers.base import Part, Partial
from linearize.mixers.state import State
from linearize.registry import Registry, discover


class Update(Part):
    """Base of the update rules.

    Args:
        config: the rule's options.
        heads: heads of the recurrent state, M.
        feature_dim: F.
        value_dim: V.
    """

    def __init__(self, config: Any, heads: int, feature_dim: int, value_dim: int) -> None:
        super().__init__()
        self.heads, self.feature_dim, self.value_dim = heads, feature_dim, value_dim

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Empty tensors of the state, each [B, ...]; `dtype` is float32 or wider."""
        raise NotImplementedError(type(self))  # pragma: no cover - every registered rule defines it

    def parallel(self, phi_q: Tensor, phi_k: Tensor, v: Tensor | None, visible: Tensor) -> Partial:
        """Dense form: phi_q [B, R, H, F], phi_k [B, S, M, F], v [B, S, M, V] under `visible` [B, R, S]."""
        raise NotImplementedError(type(self))  # pragma: no cover

    def chunked(self, phi_q: Tensor, phi_k: Tensor, v: Tensor, docs: Tensor, state: State) -> Partial:
        """O(T)-memory form; keys that nobody sees come with zero features; writes the new state."""
        raise NotImplementedError(type(self))  # pragma: no cover

    def step(self, phi_q: Tensor, phi_k: Tensor, v: Tensor, state: State) -> Partial:
        """One token (T = 1): the key is added, then the query reads; in place."""
        raise NotImplementedError(type(self))  # pragma: no cover


UPDATES: Registry[Update] = Registry("update rule")
discover(sys.modules[__name__])
