"""What surgery will do to a model, held against what a recipe's stages ask of it, before any weight is loaded."""

from __future__ import annotations

from typing import Any

from linearize import surgery
from linearize.config.schema import Recipe
from linearize.distill.positions import check_lengths
from linearize.distill.trainable import check_ranks, check_reach, needs
from linearize.errors import LinearizeError, collected


def planned(model: Any, recipe: Recipe, errors: list[LinearizeError]) -> surgery.Plan:
    """The plan of a model, loaded or not.

    Args:
        model: of transformers, its tensors on any device, the meta device too.
        recipe: composed.
        errors: gets what speaks against it; see `surgery.plan`.
    """
    asked = needs(recipe.stages.values())
    plan = surgery.plan(model, recipe.mixer, recipe.layers, **asked, errors=errors, mixers=recipe.mixers)
    with collected(errors):
        check_ranks(recipe, plan, getattr(model.config.get_text_config(), "hidden_size", None))
    with collected(errors):
        check_reach(recipe, plan)
    with collected(errors):
        check_lengths(recipe, model)
    return plan
