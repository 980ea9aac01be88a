"""Whose predictions a stage compares with: the model's own before it was converted, or those of another model.

Attention transfer imitates the attention that a mixer replaces, which is the model's own in any case.
"""

from __future__ import annotations

import logging
from typing import Any

from linearize import models
from linearize.config.schema import Recipe
from linearize.distill.finetune import needs_teacher
from linearize.errors import LinearizeError, RecipeError, collected, raise_together
from linearize.objectives import level_of

log = logging.getLogger(__name__)

COMPARING = "logits_kl and dpo"
"""Objectives that have a teacher, for messages."""


def compares(recipe: Recipe, name: str) -> bool:
    """Whether a stage compares predictions of the whole model with a teacher's."""
    objective = recipe.stages[name].objective
    return level_of(objective) == "pair" or needs_teacher(objective)


def apart(recipe: Recipe, name: str) -> bool:
    """Whether a stage's teacher is a model of its own: another one, or this one before base weights trained."""
    changed = False
    for other, stage in recipe.stages.items():
        changed = changed or "all" in stage.train
        if other == name:
            break
    return compares(recipe, name) and (changed or bool(recipe.run.teacher))


def check(recipe: Recipe, source: str, config: Any, tokenizer: Any) -> None:
    """Hold `run.teacher` and `run.teacher_device` against the stages and the model, before any weight is loaded.

    Args:
        recipe: of the run.
        source: the model that is converted.
        config: its.
        tokenizer: its.

    Raises:
        RecipeError: nothing would read the teacher, or it has another vocabulary.
        ModelNotFoundError, CheckpointError, UnsupportedModelError: as `models.load_config`, of the teacher.
    """
    other, problems = recipe.run.teacher, []
    asked = any(compares(recipe, name) for name in recipe.stages)
    if other and not asked:
        problems.append(
            f"run.teacher: {other} would not be asked: no stage has an objective that compares predictions "
            f"({COMPARING}); add one, or remove run.teacher"
        )
    if recipe.run.teacher_device == "cpu" and not any(apart(recipe, name) for name in recipe.stages):
        problems.append(
            "run.teacher_device: cpu would keep nothing there: no stage has a teacher of its own, since none "
            "compares predictions with another model or after base weights have trained; remove it"
        )
    vocabulary = config.get_text_config().vocab_size
    problems += [
        f"stages.{name}.top_k: {stage.top_k:,} is more than the {vocabulary:,} tokens that {source} knows; take fewer, "
        "or 0 for all"
        for name, stage in recipe.stages.items()
        if stage.top_k > vocabulary
    ]
    errors: list[LinearizeError] = [RecipeError(problems)] if problems else []
    if other and asked:
        with collected(errors):
            theirs = models.load_tokenizer(models.resolve(other))
            problem = _unlike(other, models.load_config(other), theirs, source, config, tokenizer)
            if problem is not None:
                raise RecipeError(
                    [
                        f"run.teacher: {problem}, so its predictions are of other tokens; take a teacher of the same "
                        "family"
                    ]
                )
    raise_together(errors, "run.teacher")


def _unlike(other: str, theirs: Any, tokens: Any, source: str, own: Any, own_tokens: Any) -> str | None:
    """In what two vocabularies differ first, or None."""
    widths = [config.get_text_config().vocab_size for config in (theirs, own)]
    if widths[0] != widths[1]:
        return f"{other} predicts {widths[0]:,} tokens, and {source} {widths[1]:,}"
    given, wanted = tokens.get_vocab(), own_tokens.get_vocab()
    differing = sorted(given.items() ^ wanted.items(), key=lambda pair: (pair[1], pair[0]))
    if not differing:
        return None
    token = differing[0][0]
    places = [str(vocabulary.get(token, "none")) for vocabulary in (given, wanted)]
    return f"{token!r} is token {places[0]} of {other}, and {places[1]} of {source}"
