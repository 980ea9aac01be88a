"""What is wrong with groups of lm-eval's tasks in a folder of one's own, told with file and line before data is read.

lm-eval takes a name that it does not know for a task that the group itself defines, and fails on what that lacks; a
file of which it can make nothing it passes over in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from linearize.registry import closest

DEFINES = ("dataset_path", "custom_dataset", "class")
"""Keys of a task that is defined where it stands."""
KINDS = ("task", "group", "class")
"""Keys one of which every file of lm-eval's has."""


class Folder:
    """The YAML files of a folder, and what lm-eval knows of them.

    Args:
        path: of the folder.
        index: name -> entry, of lm-eval's `TaskManager`.
    """

    def __init__(self, path: Path, index: Mapping[str, Any]) -> None:
        self.path = path
        self.index = index

    def problems(self, name: str) -> list[str]:
        """What is wrong with the group of that name, and with those of this folder below it, a sentence each.

        Args:
            name: of a task, group or tag, which lm-eval knows or not.
        """
        if name not in self.index:
            return [problem for file in self._files() for problem in _passed_over(file, name)]
        return list(dict.fromkeys(self._group(name, ())))

    def _files(self) -> list[Path]:
        return sorted(self.path.rglob("*.yaml"))

    def _group(self, name: str, above: tuple[str, ...]) -> Iterator[str]:
        file = getattr(self.index[name], "yaml_path", None)
        if file is None or not Path(file).is_relative_to(self.path):
            return  # a tag, or lm-eval's own
        node = _read(Path(file))
        if not isinstance(node, yaml.MappingNode) or "group" not in _keys(node):
            return
        yield from self._members(node, Path(file), (*above, name))

    def _members(self, node: yaml.MappingNode, file: Path, above: tuple[str, ...]) -> Iterator[str]:
        members = _keys(node).get("task")
        if members is None:
            return
        if not isinstance(members, yaml.SequenceNode):
            yield f"{_place(file, members)}: `task` of a group is a list of names; write [{_text(members)}]"
            return
        shared = any(key in _keys(node) for key in (*DEFINES, "include"))  # its tasks get what the group has
        for member in members.value:
            keys = _keys(member)
            named = member if isinstance(member, yaml.ScalarNode) else keys.get("group", keys.get("task"))
            name = _text(named)
            if not name:
                yield f"{_place(file, member)}: a group holds names, or {{task: NAME}} and {{group: NAME}} mappings"
            elif name in above:
                yield f"{_place(file, member)}: group '{name}' leads back to itself; take it out"
            elif name in self.index:
                yield from self._group(name, above)
            elif "group" in keys:
                yield from self._members(member, file, (*above, name))
            elif not shared and not any(key in keys for key in DEFINES):
                why = [problem for other in self._files() for problem in _passed_over(other, name)]
                near = closest(name, [*self.index])
                near = near if near.startswith("did you mean") else "`lm_eval ls tasks` lists lm-eval's own"
                yield "; ".join([f"{_place(file, member)}: there is no task '{name}'", *(why or [near])])


def _passed_over(file: Path, name: str) -> Iterator[str]:
    """Why lm-eval does not know a name that a file is meant to define."""
    node = _read(file)
    keys = _keys(node)
    if name not in {_text(value) for key, value in keys.items() if key not in ("tag", "dataset_path")}:
        return
    if not any(key in keys for key in KINDS):
        key = next(key for key, value in keys.items() if _text(value) == name)
        hint = closest(key, KINDS)
        if hint.startswith("did you mean"):
            yield f"{_place(file, node)}: '{key}' makes no task of '{name}'; {hint}"
    for other in _texts(keys.get("include")):
        path = file.parent / other
        if not path.is_file():
            there = closest(
                other, [near.name for near in file.parent.glob("*.yaml") if near != file] or [other]
            )
            hint = f"; {there}" if there.startswith("did you mean") else ""
            yield (
                f"{_place(file, keys['include'])}: '{name}' includes {path}, which is no file, so that lm-eval passes "
                f"over it{hint}"
            )


def _read(file: Path) -> Any:
    """A file's nodes, which know their lines; tags are lm-eval's."""
    try:
        return yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return None  # `lm_tasks.check_folder` tells that


def _keys(node: Any) -> dict[str, Any]:
    """The nodes under a mapping's keys; none of anything else."""
    return {_text(key): value for key, value in node.value} if isinstance(node, yaml.MappingNode) else {}


def _text(node: Any) -> str:
    return str(node.value) if isinstance(node, yaml.ScalarNode) else ""


def _texts(node: Any) -> list[str]:
    inner = node.value if isinstance(node, yaml.SequenceNode) else [node]
    return [text for text in map(_text, inner) if text]


def _place(file: Path, node: Any) -> str:
    return f"{file}, line {node.start_mark.line + 1}"
