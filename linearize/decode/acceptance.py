"""Which tokens of a draft are taken, such that the text is the one that the model itself would have made.

Greedy, a token is taken if the model would have chosen it. Sampling, a token that the draft drew with chance q and the
model gives p is taken with chance min(1, p / q), and in the place of the first that is not comes a draw from
max(p - q, 0), made to sum to one: then every token has the model's own distribution, whatever the draft's (Leviathan et
al. 2023, arXiv 2211.17192, algorithm 1 and appendix A.1; Chen et al. 2023, arXiv 2302.01318, theorem 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.decode.sampling import draw


def accept_greedy(drafted: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Take what the model agrees with.

    Args:
        drafted: [B, K] int64.
        scores: [B, K + 1, V] the model's, for the place of each token and of the one behind.

    Returns:
        Tokens [B, K + 1], of which those behind the taken ones and the next mean nothing, and how many drafted ones
        were taken [B].
    """
    best = scores.argmax(-1)
    agreed = (best[:, :-1] == drafted).long().cumprod(1).sum(1)
    return best, agreed


def accept_sampled(drafted: Tensor, proposed: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Take each token with the chance that makes the text the model's own.

    Args:
        drafted: [B, K] int64, each drawn from its row of `proposed`.
        proposed: [B, K, V] float32, the draft's probabilities, after temperature, top_k and top_p.
        wanted: [B, K + 1, V] float32, the model's, after the same.

    Returns:
        See `accept_greedy`.
    """
    p, q = (x.gather(-1, drafted[..., None])[..., 0] for x in (wanted[:, :-1], proposed))
    agreed = (torch.rand_like(p) * q < p).long().cumprod(1).sum(1)
    place = agreed[:, None, None].expand(-1, 1, wanted.shape[2])
    # behind the last drafted token nothing was proposed, and the draw is the model's own
    other = torch.cat([proposed, torch.zeros_like(proposed[:, :1])], 1)
    own = wanted.gather(1, place)[:, 0]
    left = (own - other.gather(1, place)[:, 0]).clamp_min(0)
    # of two equal distributions rounding leaves nothing
    following = draw(torch.where(left.sum(-1, keepdim=True) > 0, left, own))
    tokens = torch.cat([drafted, torch.zeros_like(drafted[:, :1])], 1)
    return tokens.scatter(1, agreed[:, None], following[:, None]), agreed
