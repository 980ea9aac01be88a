"""The run folder: what it holds, and when a run may write into it.

recipe.yaml  environment.json  plan.json  metrics.jsonl  results.json  stage-1-transfer/ ...  checkpoint/  report.md
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from linearize import config
from linearize.config.schema import Recipe
from linearize.distill.checkpoint import read_json, write_file, write_json
from linearize.errors import RunFolderError

PACKAGES = (
    "linearize",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
)


class RunFolder:
    """Paths of a run folder, and the rules for using one.

    Args:
        path: the folder; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.environment = self.path / "environment.json"
        self.plan = self.path / "plan.json"
        self.metrics = self.path / "metrics.jsonl"
        self.results = self.path / "results.json"
        self.checkpoint = self.path / "checkpoint"
        self.done = self.path / "done.json"

    def stage(self, index: int, name: str) -> Path:
        """Folder of a stage, numbered from 1."""
        return self.path / f"stage-{index}-{name}"

    def check(self, model: str, recipe: Recipe, *, resume: bool) -> bool:
        """Whether there is a run to go on with; nothing is written.

        Args:
            model: the MODEL argument.
            recipe: the composed recipe.
            resume: whether the user asked to go on.

        Raises:
            RunFolderError: the folder is in use and `resume` is false, or holds another or an ended run.
        """
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return False
        if not self.path.is_dir():
            raise RunFolderError(f"{self.path} is a file: choose another folder with --out")
        if not self.recipe.is_file():
            raise RunFolderError(
                f"{self.path} is not empty and holds no run: choose another folder with --out"
            )
        if self.done.is_file():
            raise RunFolderError(
                f"{self.path} holds a run that has ended; its model is in {self.checkpoint}. "
                "Choose another folder with --out"
            )
        if not resume:
            raise RunFolderError(
                f"{self.path} holds a run already: go on with --resume, or choose another folder with --out"
            )
        self._check_same(model, recipe)
        return True

    def create(self, recipe: Recipe, plan: Any, facts: dict[str, Any]) -> None:
        """Write what describes the run; on resume, add to it that the run went on here.

        Args:
            recipe: the composed recipe.
            plan: JSON value for plan.json.
            facts: further entries of environment.json: model, recipe, device, precision, seed.

        Raises:
            RunFolderError: the folder cannot be created.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(
                f"{self.path} cannot be created ({error}): choose another folder with --out"
            ) from error
        here = {**environment(), **facts}
        if self.environment.is_file():
            before = read_json(self.environment)
            here = {**before, "resumed": [*before.get("resumed", []), here]}
        write_json(self.environment, here)
        write_json(self.plan, plan)
        write_file(self.recipe, config.to_yaml(recipe))

    def _check_same(self, model: str, recipe: Recipe) -> None:
        differing = _differences(self.recipe.read_text(encoding="utf-8"), config.to_yaml(recipe))
        if self.environment.is_file():
            before = read_json(self.environment).get("model", model)
            if before != model:
                differing.insert(0, f"model: {before} -> {model}")
        if differing:
            listed = "\n".join(f"  - {line}" for line in differing[:10])
            raise RunFolderError(
                f"{self.path} holds a run of another recipe or model (there -> here):\n{listed}\n"
                f"Give --resume the recipe of that run ({self.recipe}), or choose another folder with --out"
            )


def environment() -> dict[str, Any]:
    """Versions, device and command of this process, for the report."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([_program(), *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": versions,
    }


def _program() -> str:
    name = Path(sys.argv[0]).name
    return "linearize" if name == "__main__.py" else name  # python -m linearize


def _differences(before: str, after: str) -> list[str]:
    """Fields that differ between two recipes in YAML, as "stages.transfer.lr: 0.01 -> 0.005"."""
    import yaml

    old, new = _flat(yaml.safe_load(before)), _flat(yaml.safe_load(after))
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flat(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat
