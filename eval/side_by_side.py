"""What teacher and student wrote behind the same words, beside each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from linearize.eval.rows import Score
from linearize.eval.writing import SAMPLES

SHOWN = 2
"""Samples in a terminal; all of them are in the folder."""


def samples(rows: Sequence[Score], folder: Path, count: int = SHOWN) -> Table | None:
    """A table of the first samples, or None where nothing was written.

    Args:
        rows: of a suite; those of its generation name the files.
        folder: of the scores.
        count: how many beginnings.
    """
    found = {}
    for key in dict.fromkeys(row.key for row in rows if row.task.split(":")[0] == "generation"):
        try:
            one = json.loads((folder / SAMPLES / f"{key}.json").read_text(encoding="utf-8"))
            found[str(one["role"])] = list(zip(one["prompts"], one["texts"], strict=True))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # somebody deleted or changed it
    if not found:
        return None
    table = Table(title="greedy continuations", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("...", *found):
        table.add_column(Text(heading), ratio=1, overflow="fold")
    for place in range(min([count, *(len(pairs) for pairs in found.values())])):
        prompt = next(iter(found.values()))[place][0]
        table.add_row(Text(str(prompt)), *(Text(str(pairs[place][1])) for pairs in found.values()))
        table.add_section()
    return table
