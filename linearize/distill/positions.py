"""Positions of packed text, for models whose table of positions does not begin at its first row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from linearize.config.schema import DataConfig, Recipe
from linearize.decode.limits import learned_positions, position_table
from linearize.errors import DataError


@contextmanager
def counted_from_zero(model: Any) -> Iterator[None]:
    """Inside, position 0 is the first that the model's table was trained on.

    Packed text counts from 0 in every document. RoBERTa and its relatives look positions up behind the row of their
    padding token when they count by themselves, and at row 0 when they are told to. The shift is made at the table, so
    that everything else still sees where documents begin.

    Args:
        model: a causal language model of transformers, or a PeftModel around one.
    """
    table = position_table(model)
    first = 0 if table is None or table.padding_idx is None or _counts(table) else table.padding_idx + 1

    def shifted(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        positions, *rest = given
        return (positions + first if isinstance(positions, Tensor) else positions, *rest)

    hook = table.register_forward_pre_hook(shifted) if table is not None and first else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def _counts(table: nn.Embedding) -> bool:
    """Whether the table is of a class that finds its rows by itself (BART, OPT)."""
    return type(table) is not nn.Embedding


def check_lengths(recipe: Recipe, model: Any) -> None:
    """Refuse training sequences longer than a table of learned positions, before any is read.

    Args:
        recipe: its `data.length` and those of its stages.
        model: the teacher.

    Raises:
        DataError: names the key, the length and the limit.
    """
    limit = learned_positions(model)
    texts: dict[str, DataConfig] = {}
    for name, stage in recipe.stages.items():
        own = stage.data is not None and stage.data.length is not None
        texts[f"stages.{name}.data.length" if own else "data.length"] = recipe.data.of(stage)
    too_long = {key: text.length for key, text in texts.items() if limit is not None and text.length > limit}
    if too_long:
        given = ", ".join(f"{key}={length}" for key, length in too_long.items())
        raise DataError(f"{given} exceeds the model's {limit} learned positions: use at most {limit}")
