"""`linearize run MODEL RECIPE`: the whole job."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from linearize import launched
from linearize.config import compose, list_recipes
from linearize.config.budget import check
from linearize.config.compose import is_file_name
from linearize.console import console, quiet_libraries
from linearize.errors import RecipeError

if TYPE_CHECKING:
    from linearize.config import Recipe
    from linearize.distill import RunSummary


def main(options: argparse.Namespace) -> int:
    """Compose and check the recipe, run it, and show what came out."""
    recipe = composed(options)
    if options.budget is not None:
        check(recipe, options.budget)
    out = options.out or default_folder(options.model, options.recipe)

    from linearize import distill  # after the recipe is known to be right: importing takes seconds

    quiet_libraries()
    name = recipe_name(options.recipe)
    summary = distill.run(
        options.model, recipe, out, resume=options.resume, recipe_name=name, budget=options.budget
    )
    if launched.first():
        _show(summary)
    return 0


def composed(options: argparse.Namespace) -> Recipe:
    """The recipe of a command line that names RECIPE, and most often MODEL; says so when the two were swapped.

    Raises:
        RecipeError: see `compose`.
    """
    try:
        return compose(options.recipe, options.overrides)
    except RecipeError as error:
        names = [name for name, _ in list_recipes()]
        recipe, model = options.recipe, getattr(options, "model", "")
        if recipe in names or os.path.isfile(os.path.expanduser(recipe)):
            raise  # it is one, and what is in it is wrong
        from linearize.models.mistaken import ENDINGS, model_as_recipe

        what = model_as_recipe(recipe)
        hints = [] if what is None else [what]
        if model in names or model.endswith(ENDINGS):
            hints.append(f"MODEL comes first, then RECIPE; '{model}' is a recipe")
        elif what is not None:
            hints.append("RECIPE is the name of a shipped one (see `linearize recipes`) or a YAML file")
        if not hints:
            raise
        # what is no recipe is near to none: not the names of all of them
        raise RecipeError([*(error.problems if what is None else []), "; ".join(hints)], "recipe") from error


def recipe_name(recipe: str) -> str:
    """The recipe's name, or its file's name without folder and ending."""
    return Path(recipe).stem if is_file_name(recipe) else recipe


def default_folder(model: str, recipe: str) -> Path:
    """runs/<model>-<recipe>, the model without its organization, folder or ending."""
    name = Path(model.rstrip("/")).name
    stem = name.rsplit(".", 1)[0] if name.lower().endswith(".gguf") else name
    return Path("runs") / f"{stem or 'model'}-{recipe_name(recipe)}"


def _show(summary: RunSummary) -> None:
    screen = console()
    screen.print(summary.table())
    for line in (
        f"checkpoint  {summary.checkpoint}",
        f"report      {summary.report}",
        f'try it      linearize generate {shlex.quote(str(summary.folder))} --prompt "..."',
    ):
        screen.print(line, markup=False, soft_wrap=True)
