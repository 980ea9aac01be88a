"""A recipe where a model is meant, and a model where a recipe is: both are short names, files and folders."""

from __future__ import annotations

import difflib
import os
import shlex
from pathlib import Path

from linearize.config.compose import list_recipes
from linearize.errors import ModelNotFoundError
from linearize.models import hub
from linearize.models.aliases import ALIASES

ENDINGS = (".yaml", ".yml")
"""Of recipe files."""
RUNS = "runs"
"""Folder that commands write into unless they are told another one."""
MODEL_FILES = ("recipe.yaml", "config.json")
"""Of a run folder, and of a checkpoint."""
MISSPELT = 0.85
"""From how alike on a name is a recipe's, misspelt: hub ids without an owner (gpt2) are further from all of them."""


def refuse_recipe(model: str) -> None:
    """Refuse a name that is a shipped recipe's, or all but one, before the hub is asked for it.

    Args:
        model: neither an alias nor anything on this machine.

    Raises:
        ModelNotFoundError: says how a model is made by that recipe, and which ones are here.
    """
    recipes = [name for name, _ in list_recipes()]
    near = difflib.get_close_matches(model.lower(), recipes, n=1, cutoff=MISSPELT)
    if not near or (near[0] != model and hub.cached(model)):
        return
    what = "that is a recipe" if near[0] == model else f"'{near[0]}' is a recipe"
    made = [name for name in models_in(Path(RUNS)) if name.endswith(f"-{near[0]}")]
    here = f"; {RUNS} holds {', '.join(made[:5])}" if made else ""
    raise ModelNotFoundError(
        f"no model '{model}': {what}, by which a model is made (`linearize run MODEL {near[0]}`, whose folder can be "
        f"given here{here}); for a model of that name on the hub write {model}@main"
    )


def refuse_recipe_file(file: Path) -> None:
    """Refuse a YAML file as a model.

    Raises:
        ModelNotFoundError: says how a model is made by it, or which one has been.
    """
    if file.suffix not in ENDINGS:
        return
    made = file.parent / "checkpoint"
    given = f"; {made} has been made by it" if file.name == "recipe.yaml" and made.is_dir() else ""
    raise ModelNotFoundError(
        f"no model '{file}': a YAML file can be a recipe, by which a model is made (`linearize run MODEL "
        f"{shlex.quote(str(file))}`, whose folder can be given here){given}"
    )


def model_as_recipe(recipe: str) -> str | None:
    """What a RECIPE argument is that is a model; None where it is none that can be told without the hub.

    Args:
        recipe: as it was given.
    """
    if recipe in ALIASES:
        return f"'{recipe}' is a model"
    of_run, of_model = (os.path.join(os.path.expanduser(recipe), file) for file in MODEL_FILES)
    if os.path.isfile(of_run):
        return f"'{recipe}' is the folder of a run, whose recipe is {of_run}"
    if os.path.isfile(of_model):
        return f"'{recipe}' is the folder of a model"
    return f"'{recipe}' is a model" if recipe.endswith(".gguf") else None


def models_in(folder: Path) -> list[str]:
    """Names of the runs and checkpoints in a folder."""
    try:
        return sorted(
            entry.name for entry in folder.iterdir() if any((entry / file).is_file() for file in MODEL_FILES)
        )
    except OSError:
        return []
