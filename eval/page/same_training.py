"""The control that tells what the text taught from what the method did: the teacher, trained alike without surgery.

It is a run of its own, by the recipe that the conversion's folder holds, with softmax in every layer.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linearize.eval.cast import CONTROLS
from linearize.eval.page.sources import Subject
from linearize.eval.rows import STUDENT, TEACHER

LEARNS = ("next_token", "dpo")
"""Objectives that look at the text or at answers. By all others a teacher without surgery is where it shall be."""
SOFTMAX = "mixer={feature_map: {name: none}, window: {name: full}}"


def without_surgery(recipe: Mapping[str, Any]) -> list[str]:
    """What a composed recipe is changed by, so that it trains the teacher in the stages that would change it.

    Args:
        recipe: as recipe.yaml holds it.

    Returns:
        Overrides; [] where no stage would teach the teacher anything.
    """
    given = recipe.get("stages")
    stages = (
        {name: one for name, one in given.items() if isinstance(one, Mapping)}
        if isinstance(given, Mapping)
        else {}
    )
    kept: dict[str, list[str]] = {}
    changes = []
    for name, stage in stages.items():
        objective, train = stage.get("objective"), stage.get("train")
        learns = isinstance(objective, Mapping) and any(objective.get(one) for one in LEARNS)
        others = [part for part in train if part != "mixers"] if isinstance(train, list) else []
        if not learns or not others:
            changes.append(f"~stages.{name}")
            continue
        kept[name] = others
        if others != train:
            changes.append(f"stages.{name}.train=[{','.join(others)}]")
        if stage.get("lr_mixers") is not None:
            changes.append(f"stages.{name}.lr_mixers=null")
        if stage.get("window_dropout"):
            changes.append(f"stages.{name}.window_dropout=0")
    if not kept:
        return []
    return [SOFTMAX, "layers=all", "mixers={}", "calibrate.tokens=0", *changes]


def missing(subject: Subject) -> bool:
    """Whether a run was judged without this control, and it would have said something."""
    roles = {row.role for row in subject.rows}
    known = {TEACHER, STUDENT, *CONTROLS}
    return (
        subject.run is not None
        and STUDENT in roles
        and roles <= known
        and bool(without_surgery(subject.run.recipe))
    )


def command(recipe: Mapping[str, Any], file: Path, teacher: str, control: Path) -> str:
    """How the control is made.

    Args:
        recipe: of the run.
        file: that holds it.
        teacher: MODEL of the command line that made the run.
        control: folder of the control.
    """
    changes = without_surgery(recipe)
    return shlex.join(["linearize", "run", teacher, str(file), *changes, "--out", str(control)])


def tokens(recipe: Mapping[str, Any]) -> int:
    """What the control is trained on, 0 where the recipe does not say."""
    dropped = {
        change[len("~stages.") :] for change in without_surgery(recipe) if change.startswith("~stages.")
    }
    counts = [stage.get("tokens") for name, stage in recipe["stages"].items() if name not in dropped]
    return sum(counts) if counts and all(type(count) is int for count in counts) else 0
