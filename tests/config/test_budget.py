"""`--budget`: what it may be, and what it makes of a recipe."""

from __future__ import annotations

import dataclasses
import math

import pytest

from linearize.config import budget, compose, list_recipes, to_yaml
from linearize.config.budget import check, least, parse, scaled, whole
from linearize.config.course import Course
from linearize.config.schema import Recipe
from linearize.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "seconds", "tokens"),
    [
        ("90s", 90, None), ("10m", 600, None), ("1.5h", 5400, None), ("1h30m", 5400, None),
        ("100M-tokens", None, 10**8), ("500k-tokens", None, 500_000), ("1_000-tokens", None, 1000),
    ],
)  # fmt: skip
def test_a_budget_is_a_time_or_tokens(text: str, seconds: float | None, tokens: int | None) -> None:
    assert parse(text) == budget.Budget(text, seconds, tokens)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("10M", "10m are minutes, 10M-tokens are tokens"),
        ("5", "5m are minutes"),
        ("10min", "did you mean '10m'"),
        ("2 hours", "did you mean '2h'"),
        ("100Mtokens", "did you mean '100M-tokens'"),
        ("100M-token", "did you mean 'tokens'"),
        ("1m1h", "in this order"),
        ("0s", "from 1s"),
        ("0-tokens", "above 0"),
        ("2.5-tokens", "whole number"),
        ("-5m", "a time such as"),
        ("soon", "a time such as"),
    ],
)
def test_what_is_none_is_told_what_was_meant(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(text)


def one(tokens: int, **fields: object) -> Recipe:
    """lolcats, one stage of 64M tokens in batches of 64 x 1,024, scaled to `tokens`."""
    return scaled(plain(**fields), tokens)


def plain(**fields: object) -> Recipe:
    recipe = compose("lolcats", ["~stages.recover"])
    stage = recipe.stages["transfer"]
    stage = dataclasses.replace(stage, **{"tokens": 64 * 2**20, "batch_size": 64, "lr": 1e-3, **fields})
    return dataclasses.replace(recipe, stages={"transfer": stage})


def test_the_batch_follows_the_root_of_the_tokens_and_the_rate_stays() -> None:
    made = one(16 * 2**20).stages["transfer"]
    assert (made.tokens, made.batch_size, made.lr) == (16 * 2**20, 32, 1e-3)
    made = one(16 * 64 * 2**20, lr_mixers=4e-3).stages["transfer"]
    assert (made.batch_size, made.lr, made.lr_mixers) == (256, 1e-3, 4e-3)


def test_where_the_batch_is_bounded_the_rate_goes_with_its_root() -> None:
    made = one(2**20).stages["transfer"]  # 8 by the root, 8,192 tokens at least, 10 for a hundred steps
    assert (made.batch_size, made.lr) == (8, 1e-3)
    made = one(2**18).stages["transfer"]  # 4 by the root, 2 for a hundred steps
    assert made.batch_size == 2 and made.lr == pytest.approx(1e-3 * math.sqrt(2 / 4), rel=1e-2)
    made = one(10**12).stages["transfer"]
    tiny = one(2**12).stages["transfer"]  # one sequence is more than the root, and the rate is not raised
    assert (tiny.batch_size, tiny.lr) == (1, 1e-3)
    wanted = 64 * math.sqrt(10**12 / (64 * 2**20))
    assert made.batch_size == 1024 and made.lr == pytest.approx(1e-3 * math.sqrt(1024 / wanted), rel=1e-2)


def test_the_advice_names_the_length_that_counts() -> None:
    """A stage with texts of its own length reads nothing of the recipe's."""
    for name, changes, key in (
        ("best_hybrid", ["data.length=64"], "stages.distill.data.length"),
        ("lolcats", [], "data.length"),
    ):
        with pytest.raises(RecipeError) as caught:
            check(compose(name, changes), parse("1k-tokens"))
        assert str(caught.value).endswith(f"or a shorter {key}")


def test_longer_texts_in_smaller_batches_are_no_larger_steps() -> None:
    """32 x 1,024, then 8 x 4,096, is scaled like 32 x 1,024."""
    recipe = compose("best_constant")
    assert Course.of(recipe.stages["distill"], 1024).shapes == [(32, 1024), (8, 4096)]
    alike = compose("best_constant", ["stages.distill.data.length=1024", "stages.distill.batch_size=32"])
    for tokens in (2_000_000, 20_000_000):
        found, plain = (scaled(each, tokens).stages["distill"] for each in (recipe, alike))
        assert found.batch_size == [plain.batch_size, plain.batch_size // 4]
        assert (found.lr, found.lr_mixers) == (plain.lr, plain.lr_mixers)


def test_the_warm_up_has_some_steps_and_no_more_than_a_tenth() -> None:
    assert one(10**9).stages["transfer"].warmup_ratio == 0.03
    short = one(2**20)
    steps = Course.of(short.stages["transfer"], 1024).steps
    assert short.stages["transfer"].warmup_ratio == pytest.approx(10 / steps, rel=1e-2)
    assert one(2**15).stages["transfer"].warmup_ratio == 0.1
    assert one(2**15, warmup_ratio=0.0).stages["transfer"].warmup_ratio == 0.0


def test_places_in_steps_move_with_the_steps() -> None:
    made = one(16 * 2**20, window_dropout=[[0, 0.9], [500, 0.5]], lr_schedule=[[0, 1], [0.5, 0.1]]).stages[
        "transfer"
    ]
    assert made.window_dropout == [[0, 0.9], [250, 0.5]] and made.lr_schedule == [[0, 1], [0.5, 0.1]]
    made = one(16 * 2**20, batch_size=[[0, 16], [100, 64]]).stages["transfer"]
    assert [value for _, value in made.batch_size] == [8, 32] and 25 <= made.batch_size[1][0] <= 100


def test_a_given_micro_batch_gives_way() -> None:
    assert one(16 * 2**20, micro_batch=8).stages["transfer"].micro_batch == 8
    assert one(16 * 2**20, micro_batch=64).stages["transfer"].micro_batch == "auto"


@pytest.mark.parametrize("name", [name for name, _ in list_recipes() if compose(name).stages])
def test_every_recipe_scales_up_and_down(name: str, tmp_path) -> None:
    recipe = compose(name)
    assert scaled(recipe, whole(recipe)) is recipe
    for tokens in (least(recipe), 10**6, 10**8, 10**11):
        tokens = max(tokens, least(recipe))
        made = scaled(recipe, tokens)
        assert whole(made) == pytest.approx(tokens, rel=0.01)
        shares = [stage.tokens / recipe.stages[name].tokens for name, stage in made.stages.items()]
        assert max(shares) < 1.05 * min(shares)
        assert (
            sum(Course.of(stage, made.data.length).tokens for stage in made.stages.values()) <= 1.01 * tokens
        )
    path = tmp_path / "scaled.yaml"
    path.write_text(to_yaml(made))
    assert compose(path) == made


def test_too_little_for_a_step_is_said_with_what_would_do() -> None:
    recipe = compose("lolcats")
    with pytest.raises(RecipeError, match=r"stage 'transfer' gets 500 tokens.*give 2048-tokens"):
        check(recipe, parse("1000-tokens"))
    check(recipe, parse("2048-tokens"))
    with pytest.raises(RecipeError, match="trains nothing"):
        check(compose("swa_sinks"), parse("10m"))
