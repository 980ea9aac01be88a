"""`linearize parts`: what a layer can be put together from, and the options of each part."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import textwrap
from typing import Any

from linearize.cli.recipes import WIDTH
from linearize.config import list_recipes, outline
from linearize.config.variants import sections
from linearize.console import console
from linearize.errors import LinearizeError
from linearize.mixers import PARTS
from linearize.mixers.options import limits_of
from linearize.registry import closest

MEANS = {
    "short_conv": "a short convolution over q, k and v before anything else",
    "feature_map": "what q and k become in the recurrent branch; without one there is no such branch",
    "gate": "how fast the recurrent branch's state forgets",
    "update": "how a key and its value are written into the state",
    "normalizer": "what the recurrent branch's sum is divided by",
    "window": "exact softmax over the tokens nearby",
    "combine": "how window and recurrent branch become one output",
    "output": "what the output goes through before the output projection",
    "position": "which branch sees rotary positions",
}
"""Part of a mixer -> what it decides; in the order of the data."""

LETTERS = (
    "x is a query or key of K dims, or the layer's input where a part makes something of tokens; q, k features of F "
    "dims, v a value of V, S a state [F, V], a decays, t a token; B texts of T tokens, H query heads, M heads of the "
    "state."
)


def main(options: argparse.Namespace) -> int:
    """List the parts, all or of one kind; of a named one every option."""
    if options.part is None:
        for part in PARTS:
            _list(part)
        console().print(
            f"{LETTERS}\n\n`linearize parts PART NAME` has the options of one, as `linearize parts gate low_rank`."
        )
        return 0
    if options.part not in PARTS:
        raise LinearizeError(f"unknown part '{options.part}'; {closest(options.part, PARTS)}")
    if options.name is None:
        _list(options.part)
    else:
        _show(options.part, options.name)
    return 0


def _list(part: str) -> None:
    registry, default = PARTS[part]
    screen = console()
    screen.print(f"{part}: {MEANS[part]} (default: {default})", markup=False)
    table = _table("name", "options", "what it is")
    for name in registry.names():
        cls = registry.get(name)
        given = ", ".join(field.name for field in dataclasses.fields(cls.Config))
        table.add_row(name, given, summary(cls))
    screen.print(table, markup=False)
    screen.print()


def _show(part: str, name: str) -> None:
    cls = PARTS[part][0].get(name)
    screen = console()
    screen.print(inspect.getdoc(cls), markup=False, soft_wrap=True)
    said, limits = documented(cls.Config), limits_of(cls.Config)
    table = _table("option", "default", "what it is")
    for field in dataclasses.fields(cls.Config):
        rule = limits[field.name].text.removeprefix("must be ") if field.name in limits else ""
        words = [text.rstrip(".") for text in (said.get(field.name, ""), rule) if text]
        table.add_row(field.name, _yaml(field.default), "; ".join(words))
    if table.row_count:
        screen.print()
        screen.print(table, markup=False)
    screen.print(f"\nin a recipe   mixer: {{{part}: {{name: {name}}}}}", markup=False)
    using = [recipe for recipe, _ in list_recipes() if uses(outline(recipe), part, name)]
    screen.print(f"recipes       {', '.join(using) or 'none'}", markup=False)


def summary(cls: type) -> str:
    """The first paragraph of a part's docstring, as one line."""
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


def documented(config: type) -> dict[str, str]:
    """Option -> the string below its field, of a part's config and of those that it begins with."""
    found: dict[str, str] = {}
    for cls in reversed([cls for cls in config.__mro__ if dataclasses.is_dataclass(cls)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def uses(recipe: dict[str, Any], part: str, name: str) -> bool:
    """Whether any mixer of a recipe, as its files say it (`config.outline`), names that choice of a part."""
    mixers = [recipe["mixer"], *sections(recipe["mixer"], recipe.get("mixers") or {}).values()]
    found = []
    for mixer in mixers:
        # what a part is by default has no meaning where there is no recurrent branch
        branch = _named(mixer.get("feature_map")) != "none"
        found.append(_named(mixer[part]) if part in mixer else PARTS[part][1] if branch else "")
    return name in found


def _named(part: Any) -> str:
    return str(part.get("name", "") if isinstance(part, dict) else part or "none")


def _table(*titles: str) -> Any:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, width=min(WIDTH, console().width))
    table.add_column(titles[0], no_wrap=True)
    for title in titles[1:]:
        table.add_column(title, overflow="fold", ratio=3 if title == titles[-1] else 1)
    return table


def _yaml(value: Any) -> str:
    """A default as a recipe writes it."""
    return re.sub(
        r"^(True|False)$",
        lambda found: found[0].lower(),
        f"{value:g}" if isinstance(value, float) else str(value),
    )
