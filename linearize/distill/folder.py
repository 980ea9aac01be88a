"""The run folder: what it holds, and when a run may write into it.

recipe.yaml  environment.json  plan.json  metrics.jsonl  results.json  stage-1-transfer/ ...  checkpoint/  report.md

recipe.yaml is written first and makes the folder a run: whatever stops a process after it, `--resume` goes on.
"""

from __future__ import annotations

import logging
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from linearize import config, launched, storing
from linearize.config.schema import Recipe
from linearize.distill.continuing import changes
from linearize.distill.identity import fingerprint
from linearize.distill.lock import LOCK
from linearize.errors import CheckpointError, ModelNotFoundError, RunFolderError
from linearize.storing import PARTIAL, read_json, write_file, write_json

log = logging.getLogger(__name__)

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


TEACHER = "teacher_fingerprint"
"""Entry of environment.json, of `run.teacher`."""
TEXTS = "texts"
"""Entry of environment.json: what the run reads, by checksum."""
ADAPTER = ".adapter"
"""Where an adapter waits that is exported beside the model."""


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

    def look(self) -> None:
        """Refuse what is no place for a run, before anything is written or locked.

        Raises:
            RunFolderError: the path is a file, or holds something else or a run that has ended.
        """
        try:
            if not os.path.lexists(self.path):
                return
            entries = list(self.path.iterdir())
        except NotADirectoryError as error:
            raise RunFolderError(f"{self.path} is a file: choose another folder with --out") from error
        except (OSError, ValueError) as error:  # a name too long, no permission, a link to nowhere
            raise RunFolderError(
                f"{self.path} cannot be used ({error}): choose another folder with --out"
            ) from error
        if self.done.is_file():
            raise RunFolderError(
                f"{self.path} holds a run that has ended; its model is in {self.checkpoint}. "
                "Choose another folder with --out"
            )
        if not self.recipe.is_file() and not self._only_beginnings(entries):
            raise RunFolderError(
                f"{self.path} is not empty and holds no run: choose another folder with --out"
            )

    def check(self, model: str, recipe: Recipe, *, resume: bool) -> dict[str, Any]:
        """Whether a run may begin or go on here; nothing is written.

        Args:
            model: the MODEL argument.
            recipe: the composed recipe.
            resume: whether the user asked to go on.

        Returns:
            What environment.json says of this process: the model's fingerprint and, where a run goes on with a
            changed recipe, the changes.

        Raises:
            RunFolderError: the folder holds another run, or one and `resume` is false.
            CheckpointError: recipe.yaml or environment.json is damaged.
            ModelNotFoundError: there is no such model.
        """
        self.look()  # once more: another process may have ended the run before this one held the folder
        teacher: dict[str, dict[str, str]] = {}
        try:
            teacher = {TEACHER: fingerprint(recipe.run.teacher)} if recipe.run.teacher else {}
        except ModelNotFoundError:
            if self.recipe.is_file():
                raise
            # `teachers.check` tells it, with all else that is wrong
        if not self.recipe.is_file():
            return {"fingerprint": fingerprint(model), **teacher}
        if not resume:
            raise RunFolderError(
                f"{self.path} holds a run already: go on with --resume, or choose another folder with --out"
            )
        found = changes(self._read_recipe(), yaml.safe_load(config.to_yaml(recipe)))
        mark, differing = self._identify(model)
        differing += found.refused + self._other_teacher(recipe.run.teacher, teacher)
        if differing:
            listed = "\n".join(f"  - {line}" for line in differing[:10])
            raise RunFolderError(
                f"{self.path} holds a run of another recipe or model (there -> here):\n{listed}\n"
                f"Give --resume the recipe of that run ({self.recipe}), or choose another folder with --out"
            )
        if not found.accepted:
            return {"fingerprint": mark, **teacher}
        log.info("%s: going on with %s", self.path, ", ".join(found.accepted))
        for note in found.notes or ["the result stays the same, up to rounding"]:
            log.info("%s", note)
        return {"fingerprint": mark, **teacher, "changed": found.accepted + found.notes}

    def hold_texts(self, marks: dict[str, str]) -> dict[str, str]:
        """The checksums of what this process reads, held against those of the run: a text may have changed its files.

        Args:
            marks: what is read -> its checksum; a run that goes on reads what is left.

        Raises:
            RunFolderError: a text is another one.
            CheckpointError: environment.json is damaged.
        """
        if not (self.recipe.is_file() and self.environment.is_file()):
            return marks
        before = read_json(self.environment, self._without_environment).get(TEXTS)
        known = before if isinstance(before, dict) else {}
        others = [name for name, mark in marks.items() if known.get(name, mark) != mark]
        if others:
            raise RunFolderError(
                f"{self.path} holds a run that read another text: that of {', '.join(others)} has changed since. Put "
                "its files back as they were, or choose another folder with --out; or, to go on with the text as it is "
                f"now, delete {self.environment.name}: neither text nor MODEL is then compared"
            )
        return marks

    def create(self, recipe: Recipe, plan: Any, facts: dict[str, Any]) -> None:
        """Write what describes the run; on resume, add to it that the run went on here.

        Args:
            recipe: the composed recipe.
            plan: JSON value for plan.json.
            facts: further entries of environment.json: model, recipe, device, precision, seed, and those of `check`.

        Raises:
            CheckpointError: the disk is full or refuses.
        """
        here = {**environment(), **facts}
        if self.recipe.is_file() and self.environment.is_file():
            before = read_json(self.environment, self._without_environment)
            self._tell_of_versions(before.get("packages"), here["packages"])
            resumed = before.get("resumed", [])
            here = {**before, "resumed": [*(resumed if isinstance(resumed, list) else []), here]}
            for key in ("fingerprint", TEXTS):
                if key not in before and key in facts:
                    here[key] = facts[key]
            write_json(self.environment, here)  # first: no changed recipe without a word of the change
            write_file(self.recipe, config.to_yaml(recipe))
        else:
            write_file(self.recipe, config.to_yaml(recipe))
            write_json(self.environment, here)
        write_json(self.plan, plan)

    def _tell_of_versions(self, before: Any, here: dict[str, str]) -> None:
        """Say in what packages this machine differs from the one that the run began on."""
        known = before if isinstance(before, dict) else {}
        others = [
            f"{name} {known[name]} -> {own}" for name, own in here.items() if known.get(name, own) != own
        ]
        if others:
            log.warning(
                "%s: going on with other packages (%s); what is computed from here on may differ in rounding from what "
                "the run would have given, or in more where a package changed what it computes",
                self.path,
                ", ".join(others),
            )

    def sweep(self, stages: list[str]) -> None:
        """Delete what processes that were cut off have left: half-written files and folders, by the names we give them.

        Args:
            stages: names, in order.
        """
        if self.path.is_dir():
            for path in list(self.path.iterdir()):
                if path.name.startswith((PARTIAL, f".{self.checkpoint.name}-", ADAPTER)):
                    storing.remove(path)
        for index, name in enumerate(["calibrate", *stages]):
            storing.sweep(self.stage(index, name))

    @property
    def _without_environment(self) -> str:
        return (
            f"Delete {self.environment.name} and go on with --resume; MODEL and texts are then not compared with those "
            "that the run began with"
        )

    def _only_beginnings(self, entries: list[Path]) -> bool:
        """Whether the folder holds nothing but what a run that got no further has left."""
        names = {path.name for path in entries if not path.name.startswith((PARTIAL, LOCK))}
        if names <= {self.environment.name, self.plan.name} and self.environment.name in names:
            try:  # earlier versions wrote these before the recipe
                packages = read_json(self.environment, "").get("packages")
            except CheckpointError:
                return False
            return isinstance(packages, dict) and "linearize" in packages
        return not names

    def _read_recipe(self) -> dict[str, Any]:
        try:
            recipe = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            recipe = None
            reason = f"cannot be read ({' '.join(str(error).split())})"
        else:
            reason = "holds no recipe"
        if not isinstance(recipe, dict):
            raise CheckpointError(
                f"{self.recipe}: {reason}. Write it again, with the RECIPE and overrides of that run: "
                f"linearize recipes show RECIPE [key=value ...] > {shlex.quote(str(self.recipe))}; "
                "then go on with --resume"
            )
        return recipe

    def _other_teacher(self, name: str, found: dict[str, dict[str, str]]) -> list[str]:
        """In what `run.teacher` is not the model that the run began with."""
        if not found or not self.environment.is_file():
            return []
        before = read_json(self.environment, self._without_environment).get(TEACHER)
        if not isinstance(before, dict):
            return []
        parts = [part for part, mark in found[TEACHER].items() if mark != before.get(part)]
        return [f"run.teacher: {name} differs in {' and '.join(parts)}"] if parts else []

    def _identify(self, model: str) -> tuple[dict[str, str], list[str]]:
        """The model's fingerprint, and in what it is not the one that the run began with."""
        before: dict[str, Any] = {}
        if self.environment.is_file():
            before = read_json(self.environment, self._without_environment)
        name, known = before.get("model", model), before.get("fingerprint")
        try:
            found = fingerprint(model)
        except ModelNotFoundError:
            if name == model:
                raise
            return {}, [f"model: {name} -> {model}"]
        if isinstance(known, dict):
            parts = [part for part in found if found[part] != known.get(part)]
            return found, [f"model: {name} -> {model} (differs in {' and '.join(parts)})"] if parts else []
        if name != model and not _same_path(name, model):
            return found, [f"model: {name} -> {model}"]
        if self.results.exists():
            log.warning(
                "%s holds no fingerprint of the model that the run began with; going on as if %s were still the same",
                self.path,
                model,
            )
        return found, []


def _same_path(one: str, other: str) -> bool:
    paths = [Path(str(name)).expanduser() for name in (one, other)]
    return all(path.exists() for path in paths) and paths[0].resolve() == paths[1].resolve()


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
        "command": f"{_program()} {shlex.join(sys.argv[1:])}",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": versions,
    }


def _program() -> str:
    name = Path(sys.argv[0]).name
    return launched.command() if name in ("__main__.py", "linearize") else name  # python -m linearize


def plan_json(plan: Any) -> dict[str, Any]:
    """A plan of surgery for plan.json: one row a layer, and the totals."""
    totals = plan.to_dict()
    return {"rows": totals.pop("layers"), **totals}


def facts(job: Any) -> dict[str, Any]:
    """What environment.json says of a run beside the machine's packages."""
    name = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "cpu"
    mixed = f"bf16 autocast, {str(job.weights)[6:]} weights, float32 masters"
    return {
        "model": job.source,
        "recipe": job.recipe_name,
        "device": name,
        "precision": mixed if job.autocast else "float32",
        "seed": job.recipe.run.seed,
        "processes": launched.count(),
        "sharded": job.place.sharded,
    }
