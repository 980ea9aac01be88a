"""A recipe whose text the teacher is to write, as one that reads files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from linearize.config import mix
from linearize.config.names import TEACHER
from linearize.config.schema import DataConfig, Recipe
from linearize.sample.job import Sampled, sample

SPARE = 1.02
"""Tokens that are sampled for one that is wanted: read again, a text has a few fewer, since a model now and then
spells a word in more pieces than its tokenizer would."""


def wanted(data: DataConfig, tokens: int) -> int:
    """Tokens of the teacher's text among so many of a section's."""
    return int(SPARE * tokens * mix.share(data, TEACHER) + 0.5)


def with_text(
    recipe: Recipe,
    tokens: int,
    *,
    teacher: dict[str, str],
    tokenizer: Any,
    load: Callable[[], Any],
    compile: bool = False,  # noqa: A002 - torch's name
) -> tuple[Recipe, Sampled]:
    """The recipe with files of the teacher's text in place of its name, wherever it stands.

    Args:
        recipe: composed.
        tokens: that are wanted, by `wanted`; the same for the same recipe, since it decides which parts are read.
        teacher, tokenizer, load, compile: see `sample`.

    Raises:
        UnsupportedModelError, DataError, CheckpointError: see `sample`.
    """
    found = sample(
        tokens,
        recipe.data.teacher,
        teacher=teacher,
        tokenizer=tokenizer,
        load=load,
        compile=compile,
        title="text from the teacher",
    )
    files = [str(path) for path in found.files]
    stages = {}
    for name, stage in recipe.stages.items():
        if mix.given(stage.data):
            assert stage.data is not None
            own = mix.written(recipe.data.of(stage), files)
            asked = {"source": own.source, "mix": own.mix or None, "template": own.template}
            asked |= {"text_field": own.text_field, "split": own.split}
            stage = replace(stage, data=replace(stage.data, **asked))
        stages[name] = stage
    return replace(recipe, data=mix.written(recipe.data, files), stages=stages), found
