"""The control that costs a training: where it is taken along by itself, and which command makes it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import yaml

from linearize.errors import LinearizeError
from linearize.eval.page import same_training

log = logging.getLogger(__name__)


def folder_of(run: Path) -> Path:
    """Where the control of a run lies, if somebody made it."""
    return run.with_name(f"{run.name}-control")


def run_of(path: str) -> Path | None:
    """The run folder that a PATH of the command line is in, or is."""
    folder = Path(path)
    run = folder.parent if folder.name == "checkpoint" else folder
    return run if run.name and (run / "recipe.yaml").is_file() else None


def found(run: Path) -> str | None:
    """The folder of a run's control, where it is finished and was trained by the run's recipe; else None, with a word.

    Args:
        run: the folder of a conversion.
    """
    folder = folder_of(run)
    if not (folder / "recipe.yaml").is_file():
        return None
    if not (folder / "done.json").is_file():
        log.info("%s is not finished: the control is measured once it is", folder)
        return None
    if not _alike(run, folder):
        log.info(
            "%s was trained by another recipe than %s without surgery, so it is no control of it; --control %s "
            "measures it all the same", folder, run, folder,
        )  # fmt: skip
        return None
    return str(folder)


def advice(run: Path, teacher: str) -> list[str]:
    """What to tell somebody who judged a run without its control.

    Args:
        run: its folder.
        teacher: MODEL that it was converted from.

    Returns:
        A sentence, and the command, where there is one.
    """
    recipe = _recipe(run)
    if not recipe.get("stages"):
        return []
    if not same_training.without_surgery(recipe):
        return [
            "No stage of this recipe learns from the text itself, only from the teacher: the teacher trained the same "
            "way without surgery is the teacher."
        ]
    tokens = same_training.tokens(recipe)
    cost = f", at {tokens:,} tokens of training" if tokens else ""
    return [
        "The teacher trained the same way, without which a gain of the text is read as the method's, has not been "
        f"made. This makes it{cost}, and the same `linearize eval` then measures it:",
        f"  {same_training.command(recipe, run / 'recipe.yaml', teacher, folder_of(run))}",
    ]


def _alike(run: Path, control: Path) -> bool:
    from linearize.config import compose

    changes = same_training.without_surgery(_recipe(run))
    try:
        wanted, is_ = compose(str(run / "recipe.yaml"), changes), compose(str(control / "recipe.yaml"))
    except LinearizeError:
        return False
    parts = ("mixer", "mixers", "layers", "stages", "data", "calibrate")
    same = all(getattr(wanted, part) == getattr(is_, part) for part in parts)
    return bool(changes) and same and wanted.run.seed == is_.run.seed


def _recipe(run: Path) -> dict[str, Any]:
    try:
        read = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return read if isinstance(read, dict) else {}
