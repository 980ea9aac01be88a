"""What Triton takes for unchanged by a loop, and what our kernels therefore do not do.

Its compiler looks at a loop's body once, and carries a variable from one turn to the next where its value is another
one behind the body. A copy of a variable that held the same value when the loop began is none: what is assigned is
lost with the turn. Its interpreter runs Python, where nothing is lost (Triton 3.6 to 3.9).
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

from linearize import kernels

ROOT = Path(kernels.__path__[0]).resolve()


def jitted(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and any(
            "jit" in ast.unparse(decorator) for decorator in function.decorator_list
        ):
            yield function


def assigned(tree: ast.AST) -> list[tuple[int, str]]:
    """Every name that is given a value, and in which line."""
    return [
        (node.lineno, node.id)
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]


def copies(loop: ast.For | ast.While) -> Iterator[tuple[int, str, str]]:
    """Line, name and source of each `name = source` in a loop, also of those in tuples."""
    for node in ast.walk(loop):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                both = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                pairs = zip(target.elts, node.value.elts, strict=True) if both else [(target, node.value)]
                for name, source in pairs:
                    if isinstance(name, ast.Name) and isinstance(source, ast.Name):
                        yield node.lineno, name.id, source.id


def lost(function: ast.FunctionDef) -> list[tuple[int, str, str]]:
    """Copies in a loop from one variable that was there before it to another, of what the first then held."""
    arguments = {argument.arg for argument in ast.walk(function.args) if isinstance(argument, ast.arg)}
    every = assigned(function)
    found = set()
    for loop in ast.walk(function):
        if isinstance(loop, ast.For | ast.While):
            before = arguments | {name for line, name in every if line < loop.lineno}
            within = [each for body in loop.body for each in assigned(body)]
            for line, name, source in copies(loop):
                fresh = any(at < line and other == source for at, other in within)
                if name in before and source in before and not fresh and name != source:
                    found.add((line, name, source))
    return sorted(found)


def test_no_variable_of_a_loop_is_a_copy_of_another():
    found = {
        f"{path.relative_to(ROOT)}: {function.name}": lost(function)
        for path in sorted(ROOT.rglob("*.py"))
        for function in jitted(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert len(found) > 50
    assert {name: copies for name, copies in found.items() if copies} == {}


def test_it_finds_them():
    tree = ast.parse(
        textwrap.dedent(
            """
            @triton.jit
            def kernel(x):
                current = tl.load(x)
                following = current
                while following < 9:
                    if following > current:
                        current = following
                    following = tl.load(x + current)

            @triton.jit
            def sound(x):
                top, next = tl.load(x), tl.load(x + 1)
                for i in range(9):
                    higher = tl.maximum(top, i)
                    top = higher
                    next = tl.load(x + i)
                    top, own = next, top
            """
        )
    )
    assert [lost(function) for function in jitted(tree)] == [[(8, "current", "following")], []]
