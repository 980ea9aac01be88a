"""A teacher's likeliest tokens and one bucket for all others: what is kept of predictions that are too many to keep.

The divergence over the K + 1 outcomes is exact for what it compares, and by the log-sum inequality never above that
over all tokens (Cover & Thomas 2006, theorem 2.7.1): what is lost is how the teacher spreads the rest. Leaving the rest
out, or scaling the K up to one, would teach the student a distribution that the teacher does not have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class TopK:
    """Predictions of a teacher.

    Attributes:
        ids: [..., K] int64, the likeliest tokens.
        log_probs: [..., K] float32, theirs.
        rest: [...] float32, log-probability of all others together; -inf where there are none.
    """

    ids: Tensor
    log_probs: Tensor
    rest: Tensor

    @classmethod
    def of(cls, logits: Tensor, count: int) -> TopK:
        """The `count` likeliest of [..., V] logits, of which there are at least as many; no graph."""
        with torch.no_grad():
            log_probs = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
            kept, ids = log_probs.topk(count, dim=-1)
            others = log_probs.scatter(-1, ids, -torch.inf)
            return cls(ids, kept, others.logsumexp(-1))

    def flat(self) -> TopK:
        """With one dimension in front of K."""
        count = self.ids.shape[-1]
        return TopK(self.ids.reshape(-1, count), self.log_probs.reshape(-1, count), self.rest.reshape(-1))

    def __getitem__(self, piece: slice) -> TopK:
        return TopK(self.ids[piece], self.log_probs[piece], self.rest[piece])


def divergence(student: Tensor, teacher: TopK) -> Tensor:
    """KL(teacher || student) [N] over the teacher's K tokens and the bucket of all others, in nats.

    Args:
        student: [N, V] logits.
        teacher: of N rows.
    """
    whole = student.logsumexp(-1)
    own = student.gather(-1, teacher.ids) - whole[:, None]
    log_probs, rest = teacher.log_probs.to(own.dtype), teacher.rest.to(own.dtype)
    found = (log_probs.exp() * (log_probs - own)).sum(-1)
    if teacher.ids.shape[-1] == student.shape[-1]:
        return found
    others = student.scatter(-1, teacher.ids, -torch.inf).logsumexp(-1) - whole
    # a teacher that is certain leaves the bucket nothing, and 0 log 0 is 0
    share = rest.exp()
    return found + torch.where(share > 0, share * (rest - others), 0.0)
