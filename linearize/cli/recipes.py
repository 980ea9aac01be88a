"""`linearize recipes`: what is shipped, and what a recipe says once it is composed."""

from __future__ import annotations

import argparse

from linearize.cli.console import console
from linearize.config import compose, list_recipes, to_yaml


def main(options: argparse.Namespace) -> int:
    """List the shipped recipes with one line each."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it does")
    for name, description in list_recipes():
        table.add_row(name, description)
    console().print(table)
    console().print("\n`linearize recipes show NAME` prints one in full; its file can be copied and changed.")
    return 0


def show(options: argparse.Namespace) -> int:
    """Print the composed, checked recipe as YAML that can be saved and run."""
    text = to_yaml(compose(options.recipe, options.overrides))
    console().print(text, end="", markup=False, soft_wrap=True)
    return 0
