"""Folders import from those to their left alone, and no module one that is still being imported."""

from __future__ import annotations

import ast
from pathlib import Path

import linearize

ROOT = Path(linearize.__file__).parent
ORDER = (
    "recipes", "kernels", "config", "models", "data", "mixers", "surgery", "objectives", "export", "decode", "sample",
    "eval", "distill", "bench", "cost", "select", "serve", "cli",
)  # fmt: skip
BACK = {
    ("config", "mixers"): "a recipe's parts are checked by the options that they declare",
    ("config", "objectives"): "and its objectives by what is registered",
    ("auto", "export"): "transformers is taught a converted model's classes when it asks for them",
    ("storing", "models"): "a folder of a run comes to be as one of the cache does",
    ("distill", "cost"): "run.shard=auto asks the plan",
    ("bench", "cli"): "`bench decode` opens a checkpoint as every command does",
}
"""What knows something to its right, inside functions alone, and why."""


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for linked in ("eval", "kernels"):  # links, which rglob does not follow
        for path in (ROOT / linked).resolve().rglob("*.py"):
            parts = ("linearize", linked, *path.relative_to((ROOT / linked).resolve()).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def at_import(tree: ast.Module) -> list[ast.Import | ast.ImportFrom]:
    """Imports that run with the module: not those in functions, nor those for type checkers alone."""
    found, waiting = [], list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        elif isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.dump(node.test):
                waiting += node.body
            waiting += node.orelse
        elif isinstance(node, ast.Try | ast.With | ast.ClassDef):
            waiting += node.body
    return found


def looks(tree: ast.Module) -> list[ast.Import | ast.ImportFrom]:
    """Every import, those in functions and for type checkers too."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def folder(name: str) -> str:
    return name.split(".")[1]


def backwards(name: str, path: Path, known: dict[str, Path]) -> set[tuple[str, str]]:
    """Folders that a module reads to the right of its own, in pairs with it; files at the top stand left of all."""
    places = {one: number for number, one in enumerate(ORDER)}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = folder(name)
    seen = {folder(other) for other in _named(looks(tree), path) if other.startswith("linearize.")}
    right = {other for other in seen & set(ORDER) if places[other] > places.get(own, -1)}
    at_once = {folder(other) for other in _named(at_import(tree), path) if other.startswith("linearize.")}
    found = {(own, other) for other in right}
    eager = {pair for pair in found if pair[1] in at_once and pair[0] in ORDER}
    assert not eager, f"{name} imports {eager} at once"
    return found


def _named(nodes: list[ast.Import | ast.ImportFrom], path: Path) -> set[str]:
    wanted: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            wanted |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, f"{path}: relative import"
            wanted |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return wanted


def needs(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    wanted = _named(at_import(ast.parse(path.read_text(encoding="utf-8"))), path)
    parents = {".".join(one.split(".")[:n]) for one in wanted for n in range(2, one.count(".") + 2)}
    own = {".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 1)}
    return (wanted | parents) & set(known) - own - {name, "linearize"}


def circle(graph: dict[str, set[str]]) -> list[str]:
    done: set[str] = set()

    def walk(name: str, above: list[str]) -> list[str]:
        if name in above:
            return [*above[above.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := walk(other, [*above, name]):
                return found
        done.add(name)
        return []

    for name in sorted(graph):
        if found := walk(name, []):
            return found
    return []


def test_folders_read_what_stands_to_their_left():
    known = modules()
    inner = {name: path for name, path in known.items() if name not in ("linearize", "linearize.__main__")}
    folders = {folder(name) for name in inner if name.count(".") > 1}
    assert folders | {"recipes"} == set(ORDER)
    found = set().union(*(backwards(name, path, known) for name, path in inner.items()))
    assert found == set(BACK), "what is no longer needed goes from the list, too"
    said = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"`{' -> '.join(ORDER)}`" in " ".join(said.split())


def test_nothing_imports_in_circles():
    known = modules()
    assert {"linearize.kernels.dispatch", "linearize.eval.rows", "linearize.distill.runner"} <= set(known)
    graph = {name: needs(name, path, known) for name, path in known.items()}
    assert "linearize.decode" in graph["linearize.sample.writer"]
    assert circle(graph) == []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c", "b"]


def test_what_decides_and_what_runs_know_each_other_one_way():
    """Inside functions too. What one kernel computes is decided in `mixers.fused`, asked in `mixers.mixer` alone."""
    known = modules()

    def read_by(name: str) -> set[str]:
        path = known[f"linearize.{name}"]
        return _named(looks(ast.parse(path.read_text(encoding="utf-8"))), path)

    assert "linearize.mixers.fused" in read_by("mixers.mixer")
    assert "linearize.surgery.projections" in read_by("surgery.layer_call")
    for one, other in (
        ("mixers.fused", "mixers.mixer"),
        ("surgery.projections", "surgery.layer_call"),
        ("surgery.projections", "surgery.attention"),
        ("surgery.attention", "surgery.projections"),
    ):
        assert f"linearize.{other}" not in read_by(one)
    asking = [
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if "fused.find(" in path.read_text(encoding="utf-8")
        or ".fused = fused" in path.read_text(encoding="utf-8")
    ]
    assert [path for path in asking if path != "mixers/seams.py"] == ["mixers/mixer.py"]
