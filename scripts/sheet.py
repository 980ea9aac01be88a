"""A JSON file of rows that are kept as they come, with its table beside; what the comparing scripts share."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from linearize.errors import LinearizeError
from linearize.registry import closest

ROOT = Path(__file__).resolve().parent.parent


class Sheet:
    """Rows by name; a call that is repeated goes on behind what is there.

    Args:
        path: the JSON file; its table is the same with .md.
        table: the whole file's content -> markdown.
    """

    def __init__(self, path: Path, table: Callable[[dict[str, Any]], str]) -> None:
        self.path = path
        self.table = table
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.found.setdefault("rows", {})

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Name -> row."""
        return self.found["rows"]

    def about(self, script: str, arguments: list[str], settings: dict[str, Any]) -> None:
        """Put down what makes the rows."""
        self.found |= {
            "command": shlex.join(["python", f"scripts/{script}", *arguments]),
            "date": datetime.now(UTC).date().isoformat(),
            "commit": commit(),
            "settings": {name: str(value) for name, value in settings.items()},
        }

    def write(self) -> None:
        """Both files, each complete or as it was."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)
        self.path.with_suffix(".md").write_text(self.table(self.found), encoding="utf-8")


def plan_of(path: Path, keys: Collection[str], needed: Collection[str]) -> dict[str, Any]:
    """A plan of variants, from its YAML file.

    Args:
        path: of the file.
        keys: that it may have.
        needed: those that it must have, beside `variants`.

    Raises:
        LinearizeError: it cannot be read, or is none.
    """
    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise LinearizeError(f"{path}: {error}") from error
    if not isinstance(plan, dict) or not isinstance(plan.get("variants"), dict):
        raise LinearizeError(f"{path}: names no variants; see scripts/ablations.yaml")
    for key in plan:
        if key not in keys:
            raise LinearizeError(f"{path}: unknown key '{key}'; {closest(str(key), list(keys))}")
    for key in needed:
        if key not in plan:
            raise LinearizeError(f"{path}: no {key}")
    return plan


def markdown(titles: list[str], rows: list[list[str]]) -> str:
    """A table, numbers on the right."""
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def names(text: str) -> list[str]:
    """`a,b` -> both; commas before a space or between digits belong to a name, "up to 4,096"."""
    return [name for name in re.split(r",(?! |(?<=\d,)\d)", text) if name]


def number(value: float | None, digits: int = 2) -> str:
    """For a cell: large ones without a fraction, nothing for none."""
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"


def commit() -> str:
    """Of the checkout."""
    made = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return made.stdout.strip() or "unknown"
