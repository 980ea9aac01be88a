"""`linearize inspect MODEL RECIPE`: what would be replaced and what it costs, from the config alone."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from linearize.cli.console import console, size
from linearize.cli.run import composed


def main(options: argparse.Namespace) -> int:
    """Print a line for each group of equal layers, then the totals and where the memory breaks even."""
    recipe = composed(options)

    from linearize import surgery  # after the recipe is known to be right: importing takes seconds
    from linearize.models import load_config

    plan = surgery.plan(load_config(options.model), recipe.mixer, recipe.layers)
    screen = console()
    screen.print(_table(plan.rows))
    for line in totals(plan.rows, options.length):
        screen.print(line, markup=False, soft_wrap=True)
    return 0


def _table(rows: Sequence[Any]) -> Any:
    from rich.table import Table

    table = Table(header_style="bold")
    table.add_column("layers", no_wrap=True)
    table.add_column("becomes")
    for title in (
        "heads",
        "kv heads",
        "head dim",
        "parameters added",
        "state / sequence",
        "KV cache / token",
    ):
        table.add_column(title, justify="right")
    for layers, row in grouped(rows):
        table.add_row(
            layers,
            row.kind,
            str(row.heads),
            str(row.kv_heads),
            str(row.head_dim),
            f"{row.params:,} each" if "-" in layers or "," in layers else f"{row.params:,}",
            size(row.state_bytes) if row.state_bytes else "grows",
            size(row.kv_bytes_per_token),
        )
    return table


def grouped(rows: Sequence[Any]) -> list[tuple[str, Any]]:
    """Equal layers under one heading ("0-6, 8"), in order of their first layer."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        groups.setdefault(_same(row), []).append(row)
    return [(ranges([row.layer for row in group]), group[0]) for group in groups.values()]


def _same(row: Any) -> tuple[Any, ...]:
    return (
        row.kind,
        row.heads,
        row.kv_heads,
        row.head_dim,
        row.params,
        row.state_bytes,
        row.kv_bytes_per_token,
    )


def ranges(numbers: Sequence[int]) -> str:
    """Sorted whole numbers as ranges: [0, 1, 2, 5] is "0-2, 5"."""
    parts = []
    for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        parts.append(f"{members[0]}-{members[-1]}" if len(members) > 1 else str(members[0]))
    return ", ".join(parts)


def totals(rows: Sequence[Any], length: int | None = None) -> list[str]:
    """What the plan comes to, in sentences.

    Args:
        rows: one for each attention layer, with state_bytes 0 where it stays softmax.
        length: context length to compare at, in tokens.
    """
    converted = [row for row in rows if row.state_bytes]
    state = sum(row.state_bytes for row in converted)
    per_token = sum(row.kv_bytes_per_token for row in converted)
    kept = sum(row.kv_bytes_per_token for row in rows) - per_token
    added = sum(row.params for row in rows)
    lines = [f"converted: {len(converted)} of {len(rows)} attention layers, {added:,} parameters added"]
    if not converted:
        return [*lines, "memory: as before, the cache grows with every token"]
    lines.append(
        f"memory: {size(state)} of state per sequence against {size(per_token)} of KV cache per token"
    )
    if per_token:
        even = math.ceil(state / per_token)
        lines.append(f"break-even: {even:,} tokens; a longer context takes less memory than before")
    if kept:
        lines.append(f"the layers that stay softmax keep {size(kept)} of KV cache per token")
    if length is not None:
        before, after = (per_token + kept) * length, state + kept * length
        change = f"{before / after:.1f} times less" if after <= before else f"{after / before:.1f} times more"
        lines.append(f"at {length:,} tokens: {size(before)} before, {size(after)} after ({change})")
    return lines
