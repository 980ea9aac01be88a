"""What tasks of lm-eval read from this machine, by checksum: a score is of these items and of no others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from linearize.eval import harness
from linearize.eval.rows import key_of
from linearize.models.cache import content_hash

FORMS = (".yaml", ".yml", ".py", ".json", ".jsonl")
"""Endings of what a folder of tasks is made of; anything else is data that a YAML names."""


def of_items(tasks: Sequence[str], data_dir: str | Path, limit: int | None = None) -> dict[str, str]:
    """Task -> checksum of the items that are scored, of the tasks on local files. Raises as `harness.items_of`."""
    return {task: key_of(items) for task, items in harness.items_of(tasks, data_dir, limit).items()}


def of_folder(include: Path) -> str:
    """Checksum of a folder of task YAMLs, of what lies with them and of the files that they name as data."""
    files = sorted(path for path in include.rglob("*") if path.suffix in FORMS and path.is_file())
    named = {data for path in files if path.suffix in FORMS[:2] for data in _data(path)}
    return key_of(
        [[str(path.relative_to(include)), content_hash(path)] for path in files],
        [[str(path), content_hash(path)] for path in sorted(named)],
    )


class _Untagged(yaml.SafeLoader):
    """Reads lm-eval's own tags (!function) as nothing."""


_Untagged.add_multi_constructor("", lambda loader, tag, node: None)


def _data(path: Path) -> Iterator[Path]:
    """The files on this machine that a YAML's `dataset_kwargs` name."""
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Untagged)
    except (OSError, ValueError, yaml.YAMLError):
        return  # told where the tasks are loaded
    given = found.get("dataset_kwargs") if isinstance(found, dict) else None
    for name in _texts(given):
        try:
            files = sorted(Path(name).rglob("*")) if Path(name).is_dir() else [Path(name)]
            yield from (file for file in files if file.is_file())
        except (OSError, ValueError):
            continue  # no path


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
