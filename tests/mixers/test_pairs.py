"""Taylor features' start: products of few dims that stand for a softmax's weights, from pairs of its own tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_by_hand import Call, call

from linearize.errors import NotFiniteError
from linearize.mixers import calibration, pairs
from linearize.mixers.base import LayerShape
from linearize.mixers.statistics import Statistics

GROUPS = {"own": 4, "grouped": 2, "shared": 1}
OPTIONS: list[dict[str, Any]] = [
    {"per": "query_head"},
    {"per": "kv_head"},
    {"tied": True},
    {"dim": 1},
    {"dim": 12},
    {"dim": 12, "per": "kv_head"},
    {"dim": 12, "tied": True},
]


def shape_of(kv_heads: int) -> LayerShape:
    return LayerShape(4, kv_heads, 8, 8, 8**-0.5, model_dim=16)


def imitating(option: dict[str, Any], kv_heads: int, *, documents: bool = True) -> Call:
    """A softmax that rests on its first key and looks sharply elsewhere, before Taylor features."""
    shape = shape_of(kv_heads)
    made, softmax = (
        call(mixer, shape)
        for mixer in ({"feature_map": {"name": "taylor", "dim": 4, **option}}, {"window": {"name": "full"}})
    )
    made.q, made.k = made.q * 2, made.k.clone()
    made.q[..., 0] += 5
    made.starts = torch.zeros(2, 96, dtype=torch.bool)
    made.starts[:, 0] = True
    made.starts[1, 40] = documents
    made.k[made.starts] = 0.1 * made.k[made.starts]
    made.k[..., 0] = torch.where(made.starts[..., None], 4.0, -0.2)
    softmax.q, softmax.k, softmax.v, softmax.starts = made.q, made.k, made.v, made.starts
    with torch.no_grad():
        made.teacher = softmax.student()
    return made


def statistics(q: torch.Tensor, k: torch.Tensor, opens: list[int]) -> Statistics:
    first = torch.zeros(len(q), dtype=torch.bool)
    first[opens] = True
    return Statistics(shape_of(k.shape[1]), q, k, first, lambda: pytest.fail("not asked for"))


@pytest.mark.parametrize("kv_heads", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_a_softmax_is_nearer_than_by_the_first_dims(option, kv_heads):
    found, states = [], []
    for _ in range(2):
        made = imitating(option, kv_heads)
        found.append(calibration.calibrate(made))
        states.append(made.mixer.state_dict())
    assert found[0].after < 0.8 * found[0].before, found[0]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_whole_heads_have_nothing_to_start():
    made = imitating({"dim": 0}, 2)
    assert made.mixer.recurrent.feature_map.starts(calibration._Layer(made).statistics) == []


@pytest.mark.parametrize("kv_heads", GROUPS.values(), ids=GROUPS)
def test_scores_come_back_where_dims_suffice(kv_heads):
    """Of heads whose queries and keys live in three of eight dims, one product of three says all, shared or not."""
    torch.manual_seed(0)
    q, k = torch.randn(600, 4, 8), torch.randn(600, kv_heads, 8)
    q[..., 3:], k[..., 3:] = 0, 0
    seen = pairs.seen(statistics(q, k, [0, 200]))
    of_queries, of_keys = (x.float() for x in pairs.products(seen, seen.scores, 3, kv_heads))
    made = torch.einsum("nhk,hkr->nhr", q, of_queries), torch.einsum("nhk,hkr->nhr", k, of_keys)
    group = 4 // kv_heads
    z = torch.einsum("ihr,jhr->hij", made[0], made[1].repeat_interleave(group, 1))
    scores = torch.einsum("ihk,jhk->hij", q, k.repeat_interleave(group, 1)) * 8**-0.5
    assert float((z - scores).square().sum() / scores.square().sum()) < 0.02


def test_moments_are_those_of_a_loop_over_pairs(monkeypatch):
    monkeypatch.setattr(pairs, "BLOCK", 5)
    torch.manual_seed(1)
    q, k = torch.randn(30, 4, 8), torch.randn(30, 2, 8)
    opens = [0, 11, 12]
    seen = pairs.seen(statistics(q, k, opens))
    expected = {name: torch.zeros(4, 8, 8, dtype=torch.float64) for name in pairs.Seen._fields}
    count = 0
    for begin, end in ((0, 11), (11, 12), (12, 30)):
        for i in range(begin + 1, end):
            keys = k[begin : i + 1].repeat_interleave(2, 1)
            scores = torch.einsum("hk,jhk->jh", q[i], keys) * 8**-0.5
            roots = (2 * len(keys) * scores.softmax(0)).sqrt()
            for j, key in enumerate(keys):
                outer = torch.einsum("hk,hl->hkl", q[i], key).double()
                expected["queries"] += torch.einsum("hk,hl->hkl", q[i], q[i])
                expected["keys"] += torch.einsum("hk,hl->hkl", key, key)
                expected["scores"] += outer * scores[j][:, None, None]
                expected["centered"] += outer * (scores[j] - scores.mean(0))[:, None, None]
                expected["roots"] += outer * roots[j][:, None, None]
                count += 1
    for name, value in seen._asdict().items():
        torch.testing.assert_close(value, expected[name] / count, atol=1e-4, rtol=1e-4, msg=name)


def test_the_root_makes_weights_that_follow_a_peaked_softmax():
    """The sum of a query's squares is its own, so what is compared are shares."""
    made = imitating({"dim": 8}, 4, documents=False)
    feature_map = made.mixer.recurrent.feature_map
    hidden = torch.ones(96, 96, dtype=torch.bool).triu(1)
    scores = torch.einsum("bihk,bjhk->bhij", made.q, made.k) * 8**-0.5
    wanted = scores.masked_fill(hidden, -torch.inf).softmax(-1)

    def apart() -> float:
        weights = torch.einsum("bihf,bjhf->bhij", feature_map.query(made.q), feature_map.key(made.k))
        weights = weights.masked_fill(hidden, 0.0)
        return float((weights / weights.sum(-1, keepdim=True) - wanted).abs().sum(-1).mean())

    with torch.no_grad():
        before = apart()
        made.mixer.load_state_dict(
            {
                f"recurrent.feature_map.{name}": value
                for name, value in feature_map.starts(calibration._Layer(made).statistics)[-1].items()
            }
        )
        assert apart() < 0.6 * before


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_queries_and_keys_without_spread_give_finite_projections(value):
    made = imitating({"dim": 4}, 2)
    made.q, made.k = torch.full_like(made.q, value), torch.full_like(made.k, value)
    for start in made.mixer.recurrent.feature_map.starts(calibration._Layer(made).statistics):
        assert all(weight.isfinite().all() for weight in start.values())


@pytest.mark.parametrize("opens", [[0], [0, 1, 2]], ids=["one token", "documents of one token"])
def test_without_pairs_there_is_nothing_to_follow(opens):
    seen = pairs.seen(statistics(torch.randn(len(opens), 4, 8), torch.randn(len(opens), 2, 8), opens))
    assert all(part.shape == (4, 8, 8) and not part.any() for part in seen)
    assert all(not part.any() for part in pairs.products(seen, seen.roots, 3, 2))
    assert pairs.tied(seen, seen.roots, 3).isfinite().all()


@pytest.mark.parametrize("large", ["q", "k", "both"])
@pytest.mark.parametrize("size", [1e14, 1e18, 3e38])
def test_products_that_overflow_are_refused_by_name(size, large):
    """Finite queries and keys may have infinite products; torch's decompositions only say that they failed."""
    q, k = torch.randn(40, 4, 8).clamp(-1, 1), torch.randn(40, 2, 8).clamp(-1, 1)
    q, k = (x * (size if large in (name, "both") else size**0.5) for name, x in (("q", q), ("k", k)))
    with pytest.raises(NotFiniteError, match=r"the layer: the mean over pairs of the teacher's .*head \d"):
        pairs.seen(statistics(q, k, [0]))
