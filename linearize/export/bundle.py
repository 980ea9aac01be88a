"""One self-contained `modeling_linearized.py`: what a checkpoint needs to load without this package.

The file is the package's own source, concatenated in dependency order, with its internal imports taken out; so it
cannot drift from what was tested. It imports torch and transformers only: the branches that lead to Triton kernels
(``if dispatch.use_triton(...):``, alone or behind ``and``) are taken out too, and what remains is every operator's
torch form; what asks for the choice elsewhere is told that it is torch. A name that two modules define gets its
module's name behind it in the second, and wherever it is imported. A module that is imported whole becomes a namespace.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import importlib.util
import pkgutil
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from transformers import PreTrainedModel

from linearize.errors import UnsupportedModelError
from linearize.surgery.model import LinearizedModel, body
from linearize.version import __version__

MODULE = "modeling_linearized"
ROOT = "linearize.surgery.model"
PACKAGE = "linearize"
DISPATCH = f"{PACKAGE}.kernels.dispatch"
"""The choice between Triton and torch, which has no place in a file that holds torch forms alone."""
STAND_IN = '''class dispatch:
    """The package chooses between Triton and torch; here it is torch."""

    @staticmethod
    def use_triton(*tensors: Any) -> bool:
        return False

    @staticmethod
    def automatic() -> bool:
        return False

    @staticmethod
    def kernels(choice: str) -> Any:
        return nullcontext()
'''
STAND_IN_IMPORTS = {"from contextlib import nullcontext", "from typing import Any"}


@dataclass
class _Source:
    """One module's contribution: its body without imports, and what it needs."""

    name: str
    body: str = ""
    external: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)
    """Modules of the package that must stand before this one."""
    later: list[str] = field(default_factory=list)
    """Modules that only functions use."""
    names: set[str] = field(default_factory=set)
    imported: set[tuple[str, str]] = field(default_factory=set)
    """Modules of the package and the names taken from them."""
    whole: set[str] = field(default_factory=set)
    """Modules of the package that are imported as such."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Its names that have become others."""
    parts: list[str] = field(default_factory=list)
    """Modules that fill its registry, each under a name."""


def bundle(model: PreTrainedModel) -> str:
    """Source of the remote-code file for the family of `model`.

    Raises:
        UnsupportedModelError: the family itself is not part of transformers.
    """
    order: list[_Source] = []
    mixers = model.config.linearize["mixers"].values()
    # the softmax mixer is the teacher's attention in our own form, which every converted layer can show
    used = {options["name"] for mixer in mixers for options in mixer.values()} | {"full"}
    _collect(ROOT, order, set(), used)
    taken: dict[str, str] = {}
    for source in order:
        for name in source.names:
            if taken.setdefault(name, source.name) != source.name:
                _rename(order, source, name, f"{name}_{'_'.join(source.name.split('.')[1:])}")
    found = {line for source in order for line in source.external}
    chooses = any("dispatch." in source.body for source in order)
    whole = {module for source in order for module in source.whole}
    found |= STAND_IN_IMPORTS if chooses else set()
    found |= {"from types import SimpleNamespace"} if whole else set()
    for source in order:
        if source.name in whole:
            source.body += "\n\n\n" + _namespace(source)
    imports = sorted(found, key=lambda line: (line.startswith("from"), line))
    parts = [
        f'"""Linearized attention for transformers, written by linearize {__version__}; loads without that package."""',
        "from __future__ import annotations",
        "\n".join(imports),
        *([STAND_IN] if chooses else []),
        *(f"# --- {source.name}\n\n{source.body}" for source in order if source.body),
        _classes(model),
    ]
    return "\n\n".join(parts) + "\n"


def auto_map(model: PreTrainedModel) -> dict[str, str]:
    """The `auto_map` entry of config.json."""
    causal_lm, base, config = base_classes(model)
    return {
        "AutoConfig": f"{MODULE}.Linearized{config.__name__}",
        "AutoModel": f"{MODULE}.Linearized{base.__name__}",
        "AutoModelForCausalLM": f"{MODULE}.Linearized{causal_lm.__name__}",
    }


def base_classes(model: PreTrainedModel) -> tuple[type, type, type]:
    """The family's own causal language model, base model and config classes.

    Raises:
        UnsupportedModelError: they are not part of transformers.
    """
    causal_lm, base = (
        next(cls for cls in type(part).__mro__ if not issubclass(cls, LinearizedModel))
        for part in (model, body(model))
    )
    config = type(model.config).__mro__[2]
    for cls in (causal_lm, base, config):
        if not cls.__module__.startswith("transformers."):
            raise UnsupportedModelError(
                f"{cls.__name__} comes from {cls.__module__}, not from transformers; save with remote_code=False"
            )
    return causal_lm, base, config


def _classes(model: PreTrainedModel) -> str:
    causal_lm, base, config = base_classes(model)
    lines = ["# --- the classes that config.json names", ""]
    classes = (config, base, causal_lm)
    lines += [f"from {cls.__module__} import {cls.__name__}  # noqa: E402" for cls in classes]
    prefix, conf = "Linearized", f"Linearized{config.__name__}"
    lines += [
        "",
        f"{conf} = config_class({config.__name__})",
        f"{prefix}{base.__name__} = model_class({base.__name__}, {conf}, head=False)",
        f"{prefix}{causal_lm.__name__} = model_class({causal_lm.__name__}, {conf}, head=True)",
    ]
    return "\n".join(lines)


def _collect(name: str, order: list[_Source], seen: set[str], used: set[str]) -> None:
    """Depth-first: what a module needs at import time, the module, then what it needs when it runs.

    Of the parts that a folder discovers, only those registered under a name in `used` come along.
    """
    if name in seen:
        return
    seen.add(name)
    source = copy.deepcopy(_read(name))
    for needed in source.first:
        _collect(needed, order, seen, used)
    order.append(source)
    for needed in (*source.later, *(part for part in source.parts if _registers(part, used))):
        _collect(needed, order, seen, used)


@functools.cache
def _text(name: str) -> str:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, name
    return Path(spec.origin).read_text()


def _registers(name: str, used: set[str]) -> bool:
    """Whether a module files a part under one of the names."""
    return any(f'.register("{part}")' in _text(name) for part in used)


def _rename(order: list[_Source], source: _Source, name: str, new: str) -> None:
    """Give a module's name another one, there and in the modules that import it, directly or from one that does."""
    source.body = _renamed(source.body, name, new)
    source.renamed[name] = new
    for other in order:
        if (source.name, name) in other.imported and other is not source:
            _rename(order, other, name, new)


def _namespace(source: _Source) -> str:
    """The module itself under its last name, for those who import it whole."""
    members = ", ".join(f"{name}={source.renamed.get(name, name)}" for name in sorted(source.names))
    return f"{source.name.rpartition('.')[2]} = SimpleNamespace({members})"


@functools.cache
def _renamed(body: str, name: str, new: str) -> str:
    """Source text with a name of its module under another one; it may not be an argument's or an attribute's too."""
    places: set[tuple[int, int]] = set()
    lines = body.encode().split(b"\n")
    for node in ast.walk(ast.parse(body)):
        assert not (isinstance(node, ast.arg) and node.arg == name), (
            f"{name} is an argument and a module's name"
        )
        if isinstance(node, ast.Name) and node.id == name:
            places.add((node.lineno - 1, node.col_offset))
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            word = b"class " if isinstance(node, ast.ClassDef) else b"def "
            places.add((node.lineno - 1, node.col_offset + len(word)))
    for line, column in sorted(places, reverse=True):
        text = lines[line]
        lines[line] = text[:column] + new.encode() + text[column + len(name) :]
    return b"\n".join(lines).decode()


def _needs_triton(test: ast.expr) -> bool:
    """Whether a condition holds only where Triton runs; negations are none of them."""
    conditions = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
    return any(ast.unparse(condition).startswith("dispatch.use_triton(") for condition in conditions)


@functools.cache
def _read(name: str) -> _Source:
    """A module of the package, which does not change while it is loaded; to be copied before it is changed."""
    text = _text(name)
    lines = text.splitlines()
    tree = ast.parse(text)
    source = _Source(name)
    dropped: set[int] = set()

    def drop(node: ast.stmt) -> None:
        dropped.update(range(node.lineno - 1, (node.end_lineno or node.lineno)))

    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        top = node in tree.body
        if node in skipped:
            continue
        if isinstance(node, ast.If) and (
            _needs_triton(node.test) or ast.unparse(node.test) == "TYPE_CHECKING"
        ):
            assert not node.orelse, f"{name}: the torch form stands behind the branch, not in an else"
            skipped.update(ast.walk(node))
            drop(node)
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            aliased = [alias.name for alias in node.names if alias.asname is not None]
            assert not aliased, f"{name}: imports {aliased[0]} under another name"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full == DISPATCH:
                    continue
                whole = isinstance(
                    getattr(importlib.import_module(node.module), alias.name, None), ModuleType
                )
                needed = full if whole else node.module
                (source.first if top else source.later).append(needed)
                source.whole |= {full} if whole else set()
                source.imported.add((node.module, alias.name))
            drop(node)
        elif top and isinstance(node, (ast.Import, ast.ImportFrom)):
            if getattr(node, "module", "") != "__future__":
                source.external.append(ast.unparse(node))
            drop(node)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            source.names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {target.id for target in targets if isinstance(target, ast.Name)}
            source.names |= names - {"__all__"}
            if "__all__" in names:
                drop(node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node is tree.body[0]:
            drop(node)
        elif isinstance(node, ast.Expr) and ast.unparse(node).startswith("discover("):
            folder = importlib.import_module(name).__path__
            source.parts += [f"{name}.{module.name}" for module in pkgutil.iter_modules(folder)]
            drop(node)
    source.body = "\n".join(line for index, line in enumerate(lines) if index not in dropped).strip()
    return source
