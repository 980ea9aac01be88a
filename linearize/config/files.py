"""Recipe files: YAML of a bounded size to plain values, refused by name where it is no recipe could be.

Nothing is built before it is counted: aliases multiply what a few lines hold, and brackets nest without end. Tags are
not taken, names are text whatever YAML makes of them, and numbers are those of `values`.
"""

from __future__ import annotations

import copy
import functools
import stat
from pathlib import Path
from typing import Any

import yaml

from linearize.config.values import as_flag, as_number, quoted, shown
from linearize.errors import RecipeError

LARGEST = 128 * 1024
"""Bytes of a file; shipped recipes have 3,000."""
VALUES = 20_000
"""Values in a file, those that an alias repeats counted each time."""
DEPTH = 30
"""Levels of brackets and indentation."""
LONGEST_KEY = 200
"""Characters."""

_TAG = "tag:yaml.org,2002:"
_TEXT = {f"{_TAG}{kind}" for kind in ("str", "timestamp", "value", "merge")}


def read(path: Path, problems: list[str] | None = None) -> dict[str, Any]:
    """The mapping that a recipe file holds.

    Args:
        path: of the file.
        problems: receives what is wrong with single keys, which are then left out; None raises that too.

    Raises:
        RecipeError: not a readable file of UTF-8 text, not YAML, or nothing that a recipe could be.
    """
    where = f"recipe {quoted(path)}"
    text = _text(path, where)
    if problems is None:
        return parse(text, where)
    found, wrong = _parsed(text, where)
    problems += wrong
    return copy.deepcopy(found)


def parse(text: str, where: str) -> dict[str, Any]:
    """The mapping that a recipe's text holds.

    Args:
        text: YAML.
        where: what is being read, for the headline of the error.

    Raises:
        RecipeError: as `read`.
    """
    found, problems = _parsed(text, where)
    if problems:
        raise RecipeError(list(problems), where)
    return copy.deepcopy(found)


@functools.lru_cache(64)
def _parsed(text: str, where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """`parse` and what is wrong with single keys, once a text: recipes begin with the same few files, and YAML is most
    of what composing one takes."""
    try:
        _check_events(text, where)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError([f"not valid YAML: {_reason(error)}"], where) from error
    if not isinstance(root, yaml.MappingNode) or not root.value:
        raise RecipeError(
            ["holds no keys; a recipe starts with `defaults: [lolcats, _self_]` or `mixer:`"], where
        )
    _Size(where).of(root, 0)
    reader = _Reader()
    found = reader.mapping(root, "")
    return found, tuple(reader.problems)


def _text(path: Path, where: str) -> str:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            reason = "Is a directory"
        elif not stat.S_ISREG(mode):
            reason = "no regular file"
        else:
            with path.open("rb") as file:
                data = file.read(LARGEST + 1)
            if len(data) <= LARGEST:
                return data.decode("utf-8-sig")
            reason = f"larger than {LARGEST:,} bytes, which no recipe is"
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text (byte {error.start + 1}); save it as UTF-8"
    except (OSError, ValueError) as error:  # a path that no file can have, too
        reason = getattr(error, "strerror", None) or str(error)
    raise RecipeError([f"cannot read {quoted(path)}: {reason}"], where)


def _check_events(text: str, where: str) -> None:
    """Refuse what would be too much to build, and more than one document; the parser keeps no levels of its own."""
    depth = values = documents = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
        elif isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        values += isinstance(event, yaml.NodeEvent)
        line = event.start_mark.line + 1 if event.start_mark else 1
        if documents > 1:
            raise RecipeError([f"line {line}: a second document (`---`); a recipe is one"], where)
        if depth > DEPTH:
            raise RecipeError([f"line {line}: nested more than {DEPTH} levels"], where)
        if values > VALUES:
            raise RecipeError([f"more than {VALUES:,} values, which no recipe has"], where)


def _reason(error: yaml.YAMLError) -> str:
    """Where the file stops being YAML, in one line."""
    mark = getattr(error, "problem_mark", None)
    problem = " ".join(str(getattr(error, "problem", None) or error).split())
    if "'\\t'" in problem:
        problem = "a tab where YAML wants spaces"
    return problem if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


class _Size:
    """How many values a node stands for once its aliases are written out; each node is counted once."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.known: dict[int, tuple[int, int]] = {}
        self.open: set[int] = set()

    def of(self, node: yaml.Node, depth: int) -> tuple[int, int]:
        """Values and levels of a node that lies `depth` levels down."""
        line = node.start_mark.line + 1
        if id(node) in self.open:
            raise RecipeError([f"line {line}: an anchor that contains itself"], self.where)
        if id(node) not in self.known:
            if depth > DEPTH:
                raise RecipeError([f"line {line}: nested more than {DEPTH} levels"], self.where)
            self.open.add(id(node))
            inner = [self.of(child, depth + 1) for child in _children(node)]
            self.open.remove(id(node))
            count = 1 + sum(values for values, _ in inner)
            self.known[id(node)] = count, 1 + max((levels for _, levels in inner), default=0)
        count, levels = self.known[id(node)]
        if count > VALUES:
            raise RecipeError(
                [f"line {line}: aliases that stand for more than {VALUES:,} values"], self.where
            )
        if depth + levels > DEPTH + 1:
            raise RecipeError([f"line {line}: nested more than {DEPTH} levels"], self.where)
        return count, levels


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


class _Reader:
    """Nodes to plain values; what a recipe does not take is collected."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def value(self, node: yaml.Node, path: str) -> Any:
        collection = isinstance(node, yaml.CollectionNode)
        known = ("map", "seq") if collection else ("null", "bool", "int", "float")
        if node.tag not in _TEXT and node.tag not in {f"{_TAG}{kind}" for kind in known}:
            self.problems.append(f"{path}: has the tag {shown(node.tag)}; a recipe holds plain values")
            return None
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, f"{path}[{index}]") for index, item in enumerate(node.value)]
        if node.tag == f"{_TAG}null":
            return None
        if node.tag in _TEXT:
            return node.value
        plain = as_flag(node.value) if node.tag == f"{_TAG}bool" else as_number(node.value)
        return node.value if plain is None else plain

    def mapping(self, node: yaml.Node, path: str) -> dict[str, Any]:
        """Keys as they are written: `on` and `3` are names here."""
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or not _is_name(key.value):
                self.problems.append(f"line {line}: a key must be a name of printable characters")
                continue
            dotted = f"{path}.{key.value}" if path else key.value
            if key.tag == f"{_TAG}merge":
                sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
                if not all(isinstance(source, yaml.MappingNode) for source in sources):
                    self.problems.append(f"line {line}: << takes a mapping, or a list of them")
                    continue
                for source in reversed(sources):
                    merged |= self.mapping(source, path)
            elif key.value in lines:
                before = lines[key.value]
                self.problems.append(
                    f"{dotted}: stands twice, in lines {before} and {line}; keep one of them"
                )
            else:
                lines[key.value] = line
                found[key.value] = self.value(value, dotted)
        return merged | found


def _is_name(key: str) -> bool:
    return 0 < len(key) <= LONGEST_KEY and key.isprintable()
