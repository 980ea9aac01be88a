"""The choice of a token where a thousand rows choose at once: what is unlikely is put aside first, then drawn from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.decode import Sampling


@dataclass(frozen=True)
class Narrow(Sampling):
    """`Sampling` with the same meaning of temperature, top k and top p, in this order, and draws of its own.

    transformers sorts the whole vocabulary for top p, and draws noise for all of it: 50 M numbers sorted a step at
    1,024 rows of 49,152. Here top k comes first, by selection, and the rest happens among k numbers a row.
    """

    def choose(self, logits: Tensor) -> Tensor:
        """The next tokens [B] for logits [B, V]; nothing is read by the host."""
        if not self.sample:
            return logits.argmax(-1)
        most = min(self.top_k or logits.shape[-1], logits.shape[-1])
        scores, tokens = logits.topk(most)
        chances = (scores.float() / self.temperature).softmax(-1)
        if self.top_p < 1.0:
            before = chances.cumsum(-1) - chances
            # the likeliest always stays
            chances = chances.masked_fill(before >= self.top_p, 0.0)
        drawn = (chances / torch.empty_like(chances).exponential_(1.0)).argmax(-1, keepdim=True)
        return tokens.gather(1, drawn)[:, 0]
