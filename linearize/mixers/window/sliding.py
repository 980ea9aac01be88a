"""Sliding-window softmax (LoLCATs' `sw` geometry, arXiv 2410.10254, section 3.3), its last keys kept in a ring."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.mixers.base import LayerShape
from linearize.mixers.window import WINDOWS
from linearize.mixers.window.handed import Handed
from linearize.mixers.window.ring import RingWindow


@WINDOWS.register("sliding")
class SlidingWindow(RingWindow):
    """Softmax over the last `size` tokens, the query's own included; older keys are handed on one by one.

    With ``first: n`` the first n tokens of a document stay visible beside them (StreamingLLM, Xiao et al. 2023, arXiv
    2309.17453, section 3.2; positions stay the text's own), and with ``feature_map: none`` that is all: no training.
    With ``sinks: learned`` the weights are exp(s) / (exp(sink) + sum exp(s)), one logit per head (gpt-oss; Lizard,
    arXiv 2507.09025, has four, which start equal, stay equal, and so are one). With ``overlap: true`` every key,
    pinned or not, goes to the recurrent branch at once. A layer whose teacher slides over fewer tokens keeps the
    teacher's window.
    """

    spreads = True

    @dataclass
    class Config(RingWindow.Config):
        pass

    def __init__(self, config: Config, shape: LayerShape) -> None:
        size = min(config.size, shape.sliding_window or config.size)
        super().__init__(config, shape, size=size, span=size)

    def stays(self, visible: Tensor, age: Tensor) -> Tensor:
        return visible & (age < self.size)

    def leaving(
        self,
        k: Tensor,
        v: Tensor,
        valid: Tensor,
        docs: Tensor,
        position: Tensor | None,
        front: Tensor | None = None,
    ) -> Handed:
        tokens = k.shape[1] - self.size
        # a key of an earlier document than the query that pushes it out is seen by no later query either
        same_doc = docs[:, :tokens] == docs[:, self.size :]
        return Handed(k[:, :tokens], v[:, :tokens], valid[:, :tokens] & same_doc, lag=self.size)

    def leaving_step(
        self, k: Tensor, v: Tensor, valid: Tensor, oldest: Tensor, position: Tensor | None
    ) -> Handed:
        rows = torch.arange(k.shape[0], device=k.device)
        return Handed(
            k[rows, oldest][:, None], v[rows, oldest][:, None], valid[rows, oldest][:, None], lag=self.size
        )
