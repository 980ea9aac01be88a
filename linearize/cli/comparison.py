"""`linearize compare A B C`: what was measured of several conversions, on one page."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from linearize.console import console, error_console

LONGEST = 100
"""Characters of a folder's name that is made of others."""


def main(options: argparse.Namespace) -> int:
    """Read, print the summary and the verdict, and write the page."""
    from rich.text import Text

    from linearize.eval import page
    from linearize.eval.page.blocks import Table
    from linearize.eval.tables import Fitted

    subjects = page.read(options.paths)
    made = page.compose(subjects)
    for block in made.sections[0].blocks:
        if isinstance(block, Table):
            console().print(Fitted(block.rows))
    sentences = [f"{made.headline.text}.", *(finding.text for finding in made.findings)]
    console().print(Text("\n".join([*sentences, ""])))
    show(made, options.out or Path("runs") / folder_name([subject.name for subject in subjects]))
    return 0


def folder_name(names: list[str]) -> str:
    """compare-A-B, of characters that every file system takes."""
    plain = [re.sub(r"[^\w.-]+", "_", name).strip("._") or "model" for name in names]
    return "-".join(["compare", *plain])[:LONGEST]


def show(made: Any, folder: Path) -> None:
    """Write a page and say where it is."""
    from linearize.eval import page

    files, missing = page.write(made, folder)
    for file in files:
        console().print(f"page    {file}", markup=False, soft_wrap=True)
    if missing is not None:
        error_console().print(f"no page.html: {missing}", markup=False, soft_wrap=True)
