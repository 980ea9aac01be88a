"""Scores of tokens against dense definitions; the recall split and the intervals against hand-made examples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional as F

import linearize.eval.token_scores as module
from linearize.eval.intervals import bootstrap, wilson
from linearize.eval.recall_split import buckets, distances
from linearize.eval.token_scores import Predictor, score_tokens


@pytest.fixture(params=["llama", "gemma2"])
def pair(request):
    """A model and another one; Gemma 2 caps its logits."""
    changes = {"final_logit_softcapping": 3.0} if request.param == "gemma2" else {}
    return tiny.model(request.param, **changes), tiny.model(request.param, seed=1, **changes)


@pytest.mark.parametrize(("recognized", "together"), [(True, 1), (True, 2), (False, 1), (False, 2)])
def test_kl_in_slices_is_dense_kl(pair, monkeypatch, recognized, together):
    teacher, student = (model.double() for model in pair)
    ids = tiny.tokens(3, 23)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 5 * tiny.VOCABULARY)  # 22 tokens are no multiple of 5
    monkeypatch.setattr(Predictor, "together", lambda self, length: together)
    predictors = [Predictor(student), Predictor(teacher)]
    assert all(one.head is not None for one in predictors)
    if not recognized:
        for one in predictors:
            one.head = None
    found = score_tokens(predictors[0], ids, predictors[1])
    with torch.no_grad():
        own, other = (F.log_softmax(model(ids).logits[:, :-1], -1) for model in (student, teacher))
    torch.testing.assert_close(
        found.nll.double(), -own.gather(2, ids[:, 1:, None])[..., 0], rtol=1e-6, atol=1e-6
    )
    dense = F.kl_div(own, other, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(found.kl.double(), dense, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.agrees.bool(), own.argmax(-1) == other.argmax(-1))
    assert found.kl.mean() > 0.1
    where = torch.zeros(3, 22, dtype=torch.bool)
    where[0, 3:11], where[2, [0, 21]] = True, True  # of the second window nothing
    some = score_tokens(predictors[0], ids, predictors[1], where=where)
    torch.testing.assert_close(some.kl, torch.where(where, found.kl, 0.0))
    torch.testing.assert_close(some.nll, torch.where(where, found.nll, 0.0))
    again = score_tokens(
        predictors[1], ids[[2, 0]], predictors[1]
    )  # of what is kept, some and in another order
    assert again.kl.abs().max() < 1e-9


def test_the_teacher_runs_once(pair, monkeypatch):
    teacher, student = pair
    ids, calls = tiny.tokens(2, 11), []
    handle = teacher.base_model.register_forward_hook(lambda *args: calls.append(1))
    reference = Predictor(teacher)
    calls.clear()
    first = score_tokens(Predictor(student), ids, reference)
    again = score_tokens(Predictor(teacher), ids, reference)
    handle.remove()
    assert len(calls) == 1 + 2 * len(ids)  # to look at the head, once as the reference, once as the model
    assert first.kl.mean() > 0.1 and again.kl.abs().max() < 1e-5 and again.agrees.all()
    # other windows are other passes
    assert score_tokens(Predictor(teacher), tiny.tokens(2, 11, seed=9), reference).kl.abs().max() < 1e-5
    assert score_tokens(Predictor(teacher), tiny.tokens(1, 30), reference).kl.abs().max() < 1e-5


def test_distance_to_the_pair_before():
    ids = torch.tensor([[5, 6, 7, 5, 6, 6, 6, 5, 6], [1, 2, 3, 4, 5, 6, 7, 8, 9]])
    #                       56 67 75 56 66 66 65 56
    assert distances(ids).tolist() == [[0, 0, 0, 3, 0, 1, 0, 4], [0] * 8]


def test_buckets_double():
    assert buckets(64) == [(0, 64)]
    assert buckets(300) == [(0, 64), (64, 128), (128, 256), (256, 512)]
    assert buckets(32768)[-1] == (16384, 32768)


def test_wilson_is_the_published_interval():
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6)
    assert wilson(10, 10)[1] == 1.0


def test_bootstrap_covers_the_mean_of_windows():
    random = np.random.default_rng(3)
    inside = 0
    for trial in range(100):
        means = random.normal(1.0, 0.3, 40)
        _, low, high = bootstrap(means * 7, np.full(40, 7), seed=trial)
        inside += low < 1.0 < high
    assert 88 <= inside <= 100
    mean, low, high = bootstrap([2.0, 30.0, 9.0], [1, 10, 0])
    assert mean == pytest.approx(32 / 11) and low <= mean <= high
    assert math.isnan(bootstrap([0.0], [0])[0])
    assert bootstrap([4.0], [2]) == (2.0, -math.inf, math.inf)
