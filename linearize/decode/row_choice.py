"""The next token of each row, by settings and draws of its own, so that its neighbours do not count."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from linearize.decode.sampling import Sampling

NO_NUMBER = -1
"""In place of a token: the logits hold NaN or infinity, and any choice would be made up."""

SEEDS = 2**66
"""More than there are seeds: negative ones are counted from behind, so that no two are one."""


@dataclass(frozen=True)
class Scores:
    """How likely the model itself found chosen tokens and the likeliest ones, before temperature and cuts.

    Attributes:
        chosen: [B] natural logarithms of probabilities.
        top: [B, k] of the likeliest, in falling order.
        ids: [B, k] which they are.
    """

    chosen: Tensor
    top: Tensor
    ids: Tensor

    def cpu(self) -> Scores:
        """A copy on the host."""
        return Scores(self.chosen.cpu(), self.top.cpu(), self.ids.cpu())


def choose(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, draws: Tensor, *, cuts: bool
) -> Tensor:
    """Tokens [B] for logits [B, V], `NO_NUMBER` where a row has none.

    The draw is the inverse of the cumulated probabilities, in falling order where there are cuts. The cuts are those
    of transformers' warpers, in their order: temperature, top_k, then top_p of what is left.

    Args:
        logits: of the next tokens.
        temperature: [B], 0 takes the likeliest.
        top_k: [B] int64, only so many likeliest stay; 0 for all.
        top_p: [B], only the fewest that hold this share of the mass stay; 1 for all.
        draws: [B] uniform numbers from 0 to 1.
        cuts: whether any row has a top_k or a top_p; without, nothing is sorted.
    """
    scores = logits.float()
    likeliest = scores.argmax(-1)
    greedy = temperature <= 0
    scaled = scores / torch.where(greedy, 1.0, temperature)[:, None]
    order = None
    if cuts:
        scaled, order = scaled.sort(-1, descending=True)
        rank = torch.arange(scaled.shape[1], device=scaled.device)
        limit = torch.where(top_k > 0, top_k, scaled.shape[1])[:, None]
        scaled = scaled.masked_fill(rank >= limit, -torch.inf)
        shares = scaled.softmax(-1)
        before = shares.cumsum(-1) - shares
        scaled = scaled.masked_fill(
            (before >= top_p[:, None]) & (rank > 0) & (top_p < 1)[:, None], -torch.inf
        )
    mass = scaled.softmax(-1).cumsum(-1)
    whole = mass[:, -1:].contiguous()
    place = torch.searchsorted(mass, draws[:, None] * whole, right=True)
    # a draw that rounds to 1 takes the last token that has any mass
    place = torch.minimum(place, torch.searchsorted(mass, whole)).clamp_max(mass.shape[1] - 1)
    drawn = (place if order is None else order.gather(1, place))[:, 0]
    return torch.where(greedy, likeliest, drawn)


def likelihoods(logits: Tensor, chosen: Tensor, count: int) -> Scores:
    """Of the chosen tokens [B] and the `count` likeliest, for logits [B, V]."""
    scores = logits.float().log_softmax(-1)
    top, ids = scores.topk(min(count, scores.shape[1]), -1)
    return Scores(scores.gather(1, chosen.clamp_min(0)[:, None])[:, 0], top, ids)


@dataclass
class Wish:
    """How one row's tokens are chosen.

    Attributes:
        sampling: settings.
        seed: of the draws; None takes one of the system's.
        scores: of how many likeliest tokens the scores are wanted, 0 of the chosen one alone; None: of none.
    """

    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    scores: int | None = None

    _random: random.Random | None = None

    def draws(self, count: int) -> list[float]:
        """The next numbers of the row's own."""
        if not self.sampling.sample:
            return [0.0] * count
        if self._random is None:
            # Random takes a seed's absolute value
            self._random = random.Random(self.seed if self.seed is None else self.seed % SEEDS)
        return [self._random.random() for _ in range(count)]


class Wishes:
    """Of so many rows, on the device.

    Args:
        rows: how many.
        device: where logits are.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._wishes = [Wish() for _ in range(rows)]
        self._temperature = torch.zeros(rows, device=device)
        self._top_k = torch.zeros(rows, dtype=torch.int64, device=device)
        self._top_p = torch.ones(rows, device=device)

    def __getitem__(self, row: int) -> Wish:
        return self._wishes[row]

    def __setitem__(self, row: int, wish: Wish) -> None:
        self._wishes[row] = wish
        settings = wish.sampling
        self._temperature[row] = settings.temperature if settings.sample else 0.0
        self._top_k[row] = settings.top_k if settings.sample else 0
        self._top_p[row] = settings.top_p if settings.sample else 1.0

    def draws(self, rows: int, count: int) -> Tensor | None:
        """[count, rows] on the device, or None where the first so many rows draw nothing."""
        if not any(wish.sampling.sample for wish in self._wishes[:rows]):
            return None
        made = [wish.draws(count) for wish in self._wishes[:rows]]
        return torch.tensor(made, device=self._temperature.device).T

    def scores(self, rows: int) -> int | None:
        """The most that any of the first so many rows wants, see `Wish.scores`."""
        wanted = [wish.scores for wish in self._wishes[:rows] if wish.scores is not None]
        return max(wanted, default=None)

    def choose(self, logits: Tensor, draws: Tensor | None, first: int = 0) -> Tensor:
        """Tokens [B] for logits [B, V] of the rows from `first` on, with draws [B] or None; see `choose`."""
        rows = slice(first, first + logits.shape[0])
        if draws is None:
            chosen = logits.argmax(-1)
        else:
            settings = [wish.sampling for wish in self._wishes[rows] if wish.sampling.sample]
            cuts = any(each.top_k > 0 or each.top_p < 1 for each in settings)
            chosen = choose(
                logits, self._temperature[rows], self._top_k[rows], self._top_p[rows], draws, cuts=cuts
            )
        highest = logits.amax(-1)  # NaN where any is
        return torch.where(highest.isfinite(), chosen, NO_NUMBER)
