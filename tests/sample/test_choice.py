"""Choosing among few gives the distribution that transformers' warpers give."""

from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from linearize.sample.choice import Narrow


@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 20, 1.0), (1.3, 30, 0.8), (1.0, 0, 0.5)]
)
def test_distribution(temperature, top_k, top_p):
    torch.manual_seed(0)
    logits = 2 * torch.randn(1, 60)
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    wanted = scores.softmax(-1)[0]
    draws = 40_000
    chosen = Narrow(True, temperature, top_k, top_p).choose(logits.expand(draws, -1))
    found = torch.bincount(chosen, minlength=60) / draws
    assert not found[wanted == 0].any()
    # five standard errors
    assert bool(((found - wanted).abs() <= 5 * (wanted * (1 - wanted) / draws).sqrt() + 1e-9).all())


def test_without_sampling_the_likeliest():
    logits = torch.randn(7, 30, generator=torch.Generator().manual_seed(1))
    assert torch.equal(Narrow().choose(logits), logits.argmax(-1))
