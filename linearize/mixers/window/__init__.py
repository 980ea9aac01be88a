"""Window branches: softmax attention over some keys, and what it hands on to the recurrent branch; one file each."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from linearize.mixers.base import LayerShape, Part, Partial
from linearize.mixers.state import State
from linearize.mixers.window.far import Far
from linearize.mixers.window.handed import Handed
from linearize.registry import Registry, discover


class Window(Part):
    """Base of the window branches.

    Attributes:
        size: tokens seen by the softmax, the query's own included, or tokens in a block; 0 = none, None = all.
        alone: whether nothing shares the branch's normalizer, so that a kernel may give its output without sums.
        far: how far away its pinned tokens may seem, or None where they are as far as they are.
        spreads: whether the last tokens before a text, and the first ones, are all that it carries over into one, so
            that processes which hold parts of a sequence fill it at once (`refill`).
    """

    size: int | None
    alone = False
    spreads = False
    far: Far | None = None

    def __init__(self, config: Any, shape: LayerShape) -> None:
        super().__init__()
        self.shape = shape

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Empty tensors of the state, each [B, ...]."""
        return {}

    def parallel(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        visible: Tensor,
        age: Tensor,
        sink: Tensor | None = None,
    ) -> tuple[Partial | None, Tensor | None]:
        """Dense form: q [B, R, H, K] against all keys -> the partial, and the mask [B, R, S] of what is left to see.

        `visible` [B, R, S] is the causal, padding and document mask; `age` [R, S] or [B, R, S] how many tokens ago a
        key came, padding not counted; `sink` [H] the logit of the teacher's own attention sink, which joins the
        softmax's sum of weights.
        """
        raise NotImplementedError(type(self))  # pragma: no cover - every registered window defines it

    def chunked(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor,
        docs: Tensor,
        state: State,
        front: Tensor | None = None,
        sink: Tensor | None = None,
        *,
        fresh: bool = False,
        whole: bool = False,
    ) -> tuple[Partial | None, Handed | None]:
        """O(T)-memory form over rows without padding between tokens; writes the new ring into `state`.

        `front` [B] is the padding in front of each row, behind which the state's keys belong. `fresh`: the state is
        empty, and nobody reads what is written; `whole`: neither padding nor a document's border.
        """
        raise NotImplementedError(type(self))  # pragma: no cover

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, state: State, sink: Tensor | None = None
    ) -> tuple[Partial | None, Handed | None]:
        """One token (T = 1), in place."""
        raise NotImplementedError(type(self))  # pragma: no cover


WINDOWS: Registry[Window] = Registry("window")
discover(sys.modules[__name__])
