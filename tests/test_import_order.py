"""No module needs, while it is imported, one that is still being imported: which is first must not matter."""

from __future__ import annotations

import ast
from pathlib import Path

import linearize

ROOT = Path(linearize.__file__).parent


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


def needs(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    wanted = set()
    for node in at_import(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, f"{path}: relative import"
            wanted |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
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
    for knows, known in (("mixers.mixer", "mixers.fused"), ("surgery.layer_call", "surgery.projections")):
        texts = [
            (ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8") for name in (knows, known)
        ]
        names = [
            [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
            for text in texts
        ]
        imported = [
            {f"{getattr(node, 'module', '')}.{alias.name}" for node in found for alias in node.names}
            for found in names
        ]
        assert any(f"linearize.{known}" in name for name in imported[0])
        assert not any(f"linearize.{knows}" in name for name in imported[1])
    asking = [
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if "fused.find(" in path.read_text(encoding="utf-8")
        or ".fused = fused" in path.read_text(encoding="utf-8")
    ]
    assert [path for path in asking if path != "mixers/seams.py"] == ["mixers/mixer.py"]
