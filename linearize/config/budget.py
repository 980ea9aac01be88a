"""`--budget`: a recipe for another amount of training, by rules that are the same for every recipe.

With r the new tokens of all stages over the recipe's own:

- tokens: each stage's times r, so that stages keep their proportion.
- batch: times sqrt(r). The best and the critical batch grow with the tokens as a power below one, and hardly with the
  model (Zhang et al. 2024, arXiv 2410.21676; Bergsma et al. 2025, arXiv 2505.13738); that the power is a half is our
  choice. From `FEW_TOKENS` a step, below which a GPU is not busy, to `MOST_TOKENS`, or the recipe's own batch where
  that is smaller or larger; but never so large that a stage has fewer than `LEAST_STEPS` steps, while it is above one
  sequence.
- rates: AdamW's grow with the square root of the batch (Malladi et al. 2022, arXiv 2205.10287), which is r^(1/4) here,
  and fall as a power of the length of the training (Bjorck et al. 2024, arXiv 2409.19913). That the two cancel is our
  choice: a rate stays the recipe's, but times sqrt(batch / (sqrt(r) recipe's batch)) where a bound holds the batch
  down. It is never raised: a rate that is too high breaks a model, one that is too low only takes longer.
- warm-up: its share of the steps, but `WARM_STEPS` steps where that is more, and a tenth of the stage at most; none
  where the recipe has none.
- places given as steps ([[0, 8], [200, 32]]): in proportion to the stage's steps.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from linearize.config.course import Course
from linearize.config.schedule import Over
from linearize.config.schema import Recipe, StageConfig
from linearize.config.values import as_whole, quoted
from linearize.errors import RecipeError
from linearize.registry import closest

FEW_TOKENS, MOST_TOKENS = 2**13, 2**20
"""Of a step."""
LEAST_STEPS = 100
WARM_STEPS = 10
WARM_SHARE = 0.1
UNITS = {"s": 1, "m": 60, "h": 3600}
"""Seconds."""
LONGEST = 90 * 24 * 3600
FORM = "a time such as 90s, 10m or 1h30m, or tokens such as 100M-tokens"
SCALED = (
    "tokens", "batch_size", "micro_batch", "lr", "lr_mixers", "warmup_ratio", "window_dropout", "lr_schedule", "data"
)  # fmt: skip
"""Fields of a stage that a budget may change."""


@dataclass(frozen=True)
class Budget:
    """What training may take: seconds of this machine, or tokens; one of the two.

    Attributes:
        text: as it was written.
        seconds: of all stages' training.
        tokens: of all stages.
    """

    text: str
    seconds: float | None = None
    tokens: int | None = None


def parse(text: str) -> Budget:
    """A budget from its text.

    Raises:
        ValueError: it is none; the message has the value, the rule and what was probably meant.
    """
    said = text.strip()
    amount, dash, unit = said.partition("-")
    if dash and amount:
        if unit.lower() != "tokens":
            raise ValueError(
                f"{quoted(text)}: unknown unit {quoted(unit)}; {closest(unit, ['tokens'])} Give {FORM}"
            )
        tokens = as_whole(amount)
        if tokens is None or not 0 < tokens <= 10**15:
            raise ValueError(
                f"{quoted(text)}: tokens are a whole number above 0 and at most 10^15, such as 100M-tokens"
            )
        return Budget(said, tokens=tokens)
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh])", said)
    if not parts or "".join(number + unit for number, unit in parts) != said:
        raise ValueError(f"{quoted(text)} is no budget; {_meant(said)}")
    units = [unit for _, unit in parts]
    if units != sorted(set(units), key="hms".index):
        raise ValueError(
            f"{quoted(text)}: hours, minutes and seconds come in this order, once each, as in 1h30m"
        )
    seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
    if not 1 <= seconds <= LONGEST:
        raise ValueError(f"{quoted(text)}: a time is from 1s to {LONGEST // 3600}h")
    return Budget(said, seconds=seconds)


def _meant(said: str) -> str:
    """What was probably meant by something that is no budget."""
    number = re.match(r"\d+(?:\.\d+)?", said)
    if number is None:
        return f"give {FORM}"
    amount, rest = number[0], said[number.end() :].strip()
    if not rest:
        return f"what of? {amount}m are minutes, {amount}M-tokens are tokens"
    if rest == "M":
        return f"{amount}m are minutes, {amount}M-tokens are tokens"
    words = {"seconds": "s", "sec": "s", "minutes": "m", "min": "m", "hours": "h", "hrs": "h", "hr": "h"}
    if rest.lower() in words or rest in ("S", "H"):
        return f"did you mean '{amount}{words.get(rest.lower(), rest.lower())}'?"
    tokens = re.fullmatch(r"([kmbgt]?)[\s_]*tok\w*", rest, re.IGNORECASE)
    if tokens is not None or rest.lower() in ("k", "b", "g", "t"):
        return f"did you mean '{amount}{rest[:1] if tokens is None else tokens[1]}-tokens'?"
    return f"give {FORM}"


def whole(recipe: Recipe) -> int:
    """Tokens of all stages."""
    return sum(stage.tokens for stage in recipe.stages.values())


def least(recipe: Recipe) -> int:
    """Tokens of the smallest budget: each stage has one step of one of its sequences."""
    share = [_longest(recipe, stage) / stage.tokens for stage in recipe.stages.values()]
    return math.ceil(max(share) * whole(recipe))


def check(recipe: Recipe, budget: Budget) -> None:
    """Refuse what no measurement is needed for.

    Raises:
        RecipeError: the recipe trains nothing, or the tokens are not enough for a step of each stage.
    """
    if not recipe.stages:
        raise RecipeError([f"--budget {budget.text}: this recipe trains nothing; leave --budget out"])
    smallest = least(recipe)
    if budget.tokens is None or budget.tokens >= smallest:
        return
    tight = max(
        recipe.stages, key=lambda name: _longest(recipe, recipe.stages[name]) / recipe.stages[name].tokens
    )
    stage = recipe.stages[tight]
    raise RecipeError(
        [
            f"--budget {budget.text}: in the recipe's proportions stage '{tight}' gets "
            f"{budget.tokens * stage.tokens // whole(recipe):,} tokens, less than one sequence of "
            f"{_longest(recipe, stage):,}; give {smallest}-tokens or more, or a shorter {stage.length_key(tight)}"
        ]
    )


def scaled(recipe: Recipe, tokens: int) -> Recipe:
    """The recipe for `tokens` training tokens of all stages together, by the rules above.

    Args:
        recipe: with stages; it stays as it is.
        tokens: `least` or more.

    Raises:
        RecipeError: what a stage says of its own course does not fit any more.
    """
    from linearize.config.semantics import problems

    share = tokens / whole(recipe)
    if share == 1:
        return recipe
    stages = {name: _stage(recipe, stage, share) for name, stage in recipe.stages.items()}
    found = dataclasses.replace(recipe, stages=stages)
    wrong = problems(found)
    if wrong:
        raise RecipeError(wrong, f"the recipe for {tokens:,} tokens")
    return found


def _longest(recipe: Recipe, stage: StageConfig) -> int:
    return recipe.data.of(stage).length


def _stage(recipe: Recipe, stage: StageConfig, share: float) -> StageConfig:
    before = Over.of(stage.batch_size).most
    tokens = max(_longest(recipe, stage), round(stage.tokens * share))
    # the longest texts may come in smaller batches: the largest step in tokens for each sequence of the largest batch
    steps = (batch * length for batch, length in Course.of(stage, recipe.data.length).shapes)
    length = max(1, max(steps) // before)
    wanted = before * math.sqrt(share)
    few, most = min(before, -(-FEW_TOKENS // length)), max(before, MOST_TOKENS // length)
    batch = max(1, min(max(round(wanted), few), most, tokens // (LEAST_STEPS * length)))
    factor = math.sqrt(min(1.0, batch / wanted)) if batch != round(wanted) else 1.0
    made = dataclasses.replace(
        stage,
        tokens=tokens,
        batch_size=_each(stage.batch_size, lambda value: max(1, round(value * batch / before))),
        lr=_rounded(stage.lr * factor),
        lr_mixers=None if stage.lr_mixers is None else _rounded(stage.lr_mixers * factor),
    )
    if isinstance(stage.micro_batch, int) and any(
        size % stage.micro_batch for size in Over.of(made.batch_size).values
    ):
        made.micro_batch = "auto"
    return _timed(made, Course.of(stage, recipe.data.length).steps, recipe.data.length)


def _timed(stage: StageConfig, before: int, length: int) -> StageConfig:
    """Warm-up and places in steps, where the stage had `before` steps; the batch's own places first."""
    # a batch's places change the number of steps, which hardly matters for where they are
    rough = Course.planned(
        stage.tokens, Over.of(Over.of(stage.batch_size).most), Over.of(_lengths(stage, length))
    ).steps
    stage.batch_size = _moved(stage.batch_size, rough / before)
    steps = Course.of(stage, length).steps
    stage.window_dropout = _moved(stage.window_dropout, steps / before)
    if not isinstance(stage.lr_schedule, str):
        stage.lr_schedule = _moved(stage.lr_schedule, steps / before)
    if stage.data is not None and stage.data.length is not None:
        stage.data = dataclasses.replace(stage.data, length=_moved(stage.data.length, steps / before))
    if stage.warmup_ratio > 0:
        least = min(WARM_STEPS / steps, WARM_SHARE)
        stage.warmup_ratio = max(stage.warmup_ratio, _rounded(least))
    return stage


def _lengths(stage: StageConfig, length: int) -> Any:
    own = None if stage.data is None else stage.data.length
    return Over.of(length if own is None else own).most


def _each(value: Any, change: Any) -> Any:
    """A value over a stage with each of its numbers changed."""
    if not isinstance(value, (list, tuple)):
        return change(value)
    if not isinstance(value[0], (list, tuple)):
        return [change(number) for number in value]
    return [[start, change(number)] for start, number in value]


def _moved(value: Any, factor: float) -> Any:
    """A value over a stage with its places moved, where they are steps."""
    if not isinstance(value, (list, tuple)) or not Over.of(value).by_step:
        return value
    moved: list[list[Any]] = []
    for start, number in value:
        place = 0 if start == 0 else max(1, round(start * factor), moved[-1][0] + 1)
        moved.append([place, number])
    return moved


def _rounded(number: float) -> float:
    return float(f"{number:.3g}")


def outline(before: Recipe, after: Recipe) -> list[str]:
    """A line for each stage: what it trains on now, and what changed."""
    lines = []
    for name, stage in after.stages.items():
        old, course = before.stages[name], Course.of(stage, after.data.length)
        parts = [f"{course.tokens:,} tokens in {course.steps:,} steps"]
        parts.append(f"batch {_arrow(old.batch_size, stage.batch_size)}")
        parts.append(f"lr {_arrow(old.lr, stage.lr)}")
        if stage.lr_mixers is not None:
            parts.append(f"lr_mixers {_arrow(old.lr_mixers, stage.lr_mixers)}")
        lines.append(f"{name}: {', '.join(parts)}")
    return lines


def _arrow(before: Any, after: Any) -> str:
    return f"{after}" if before == after else f"{before} -> {after}"


def plain(stages: Mapping[str, StageConfig]) -> dict[str, dict[str, Any]]:
    """The fields that a budget may change, as plain values."""
    return {
        name: {key: value for key, value in dataclasses.asdict(stage).items() if key in SCALED}
        for name, stage in stages.items()
    }
