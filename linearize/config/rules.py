"""Which values each field of the schema allows, beyond its type: ranges and fixed choices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from linearize.config import schema


@dataclass(frozen=True)
class Rule:
    """What must hold for a value, and how to say so."""

    holds: Callable[[Any], bool]
    text: str


def _at_least(low: float) -> Rule:
    return Rule(lambda value: value >= low, f"must be at least {low:g}")


def _above(low: float) -> Rule:
    return Rule(lambda value: value > low, f"must be above {low:g}")


def _share(*, one: bool) -> Rule:
    if one:
        return Rule(lambda value: 0 <= value <= 1, "must lie between 0 and 1")
    return Rule(lambda value: 0 <= value < 1, "must be at least 0 and below 1")


TEMPLATES = ("none", "rendered", "alpaca", "chat")

CHOICES: dict[type, dict[str, tuple[str, ...]]] = {
    schema.DataConfig: {"template": TEMPLATES},
    schema.StageDataConfig: {"template": (*TEMPLATES, "preference")},
    schema.RunConfig: {"device": ("auto", "cpu", "cuda"), "precision": ("auto", "fp32", "bf16")},
}
"""Class -> field -> the only values it may have."""

ITEM_CHOICES: dict[type, dict[str, tuple[str, ...]]] = {
    schema.LoraConfig: {"targets": ("q", "k", "v", "o")},
    schema.StageConfig: {
        "train": ("mixers", "lora", "all"),
        "freeze": ("embeddings", "norms", "mlp"),
    },
}
"""Class -> list field -> the only values its items may have; none twice, and at least one but in `MAY_BE_EMPTY`."""

MAY_BE_EMPTY = frozenset({"freeze"})
"""List fields of `ITEM_CHOICES` whose default is empty."""

RULES: dict[type, dict[str, Rule]] = {
    schema.LoraConfig: {"rank": _at_least(1), "alpha": _above(0), "dropout": _share(one=False)},
    schema.StageConfig: {
        "tokens": _above(0),
        "batch_size": _at_least(1),
        "grad_accum": _at_least(1),
        "lr": _above(0),
        "lr_mixers": _above(0),
        "min_lr_ratio": _share(one=True),
        "warmup_ratio": _share(one=False),
        "weight_decay": _at_least(0),
        "grad_clip": _at_least(0),
        "window_dropout": _share(one=False),
        "dpo_beta": _above(0),
        "log_every": _at_least(1),
        "save_every": _at_least(1),
    },
    schema.DataConfig: {"length": _at_least(2)},
    schema.StageDataConfig: {"length": _at_least(2)},
    schema.EvalConfig: {
        "length": _at_least(2),
        "max_windows": _at_least(0),
        "batch_size": _at_least(1),
        "task_limit": _at_least(0),
    },
    schema.RunConfig: {
        "seed": Rule(lambda value: 0 <= value < 2**32, "must lie between 0 and 4294967295"),
        "workers": _at_least(0),
    },
}
"""Class -> field -> its range."""
