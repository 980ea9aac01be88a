"""`linearize inspect MODEL RECIPE`: what would be replaced and what it costs, from the config alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from linearize.cli.run import composed
from linearize.config.names import DEFAULT
from linearize.console import console, quiet_libraries, size

if TYPE_CHECKING:
    from rich.table import Table

    from linearize.surgery.plan import Plan, Row


def main(options: argparse.Namespace) -> int:
    """Print a line for each group of equal layers, then the totals and where the memory breaks even."""
    recipe = composed(options)

    from linearize import surgery  # after the recipe is known to be right: importing takes seconds
    from linearize.distill.trainable import check_ranks, check_reach, needs
    from linearize.errors import LinearizeError, collected, raise_together
    from linearize.models import load_config

    quiet_libraries()
    asked = needs(recipe.stages.values())
    config = load_config(options.model)
    errors: list[LinearizeError] = []
    plan = surgery.plan(config, recipe.mixer, recipe.layers, **asked, errors=errors, mixers=recipe.mixers)
    with collected(errors):
        check_ranks(recipe, plan, getattr(config.get_text_config(), "hidden_size", None))
    with collected(errors):
        check_reach(recipe, plan)
    raise_together(errors, f"{options.recipe} on {options.model}")
    screen = console()
    screen.print(table(plan))
    for line in [*_experts(config), *totals(plan, options.length)]:
        screen.print(line, markup=False, soft_wrap=True)
    return 0


def table(plan: Plan) -> Table:
    """A line for each group of equal layers; parameters, state and KV bytes are of one layer and one sequence.

    Args:
        plan: of `surgery.plan`.
    """
    from rich import box
    from rich.table import Table

    from linearize.config.words import describe

    words = {name: describe(section) for name, section in plan.mixers.items()}
    kept = "(stay softmax)"
    longest = max(len(word) for text in (words.values() if words else [kept]) for word in text.split())
    grid = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    grid.add_column("layers", max_width=40)
    grid.add_column("become", min_width=longest)
    for title in ("heads", "kv\nheads", "head\ndim", "parameters", "state", "KV /\ntoken"):
        grid.add_column(title, justify="right", no_wrap=True)
    for layers, row in grouped(plan.rows):
        become = kept if row.mixer is None else words[row.mixer]
        named = row.mixer is not None and len(words) > 1 and row.mixer != DEFAULT
        grid.add_row(
            layers,
            f"{row.mixer}: {become}" if named else become,
            str(row.heads),
            str(row.kv_heads),
            str(row.head_dim),
            f"{row.parameters:,}",
            size(row.state_bytes) if row.state_bytes else "grows",
            size(row.kv_bytes_per_token) + ("" if row.kv_window is None else f"\nto {row.kv_window:,}"),
        )
    return grid


def grouped(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """Equal layers under one heading ("0-6, 8"), in order of their first layer."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        shape = (row.kind, row.mixer, row.heads, row.kv_heads, row.head_dim)
        groups.setdefault((*shape, row.parameters, row.state_bytes, *_cache(row)), []).append(row)
    from linearize.config.words import ranges

    return [(ranges([row.layer for row in group]), group[0]) for group in groups.values()]


def _cache(row: Row) -> tuple[int, int | None]:
    return row.kv_bytes_per_token, row.kv_window


def totals(plan: Plan, length: int | None = None) -> list[str]:
    """What the plan comes to, in sentences. Bytes are those of a model in bfloat16; states are float32.

    Args:
        plan: of `surgery.plan`.
        length: context length to compare at, in tokens.
    """
    lines = [
        f"converted   {len(plan.converted)} of {len(plan.rows)} attention layers",
        f"added       {plan.parameters:,} parameters",
        *_others(plan),
    ]
    if not plan.state_bytes:
        return [*lines, "memory      as before: the KV cache grows with every token"]
    state, per_token = plan.state_bytes, plan.kv_bytes_per_token
    lines.append(
        f"memory      {size(state)} of state per sequence in place of {size(per_token)} of KV cache per token"
    )
    lines += _break_even(plan)
    kept = [row for row in plan.rows if row.kind != "mixer" or row.grows]
    if kept:
        growth = sum(row.kv_bytes_per_token for row in kept)
        which = "see every token" if any(row.grows for row in kept) else "stay softmax"
        lines.append(f"            the layers that {which} keep {size(growth)} of KV cache per token")
    if length is not None:
        before = sum(row.kv_bytes(length) for row in plan.rows)
        after = state + sum(row.kv_bytes(length) for row in kept)
        change = f"{before / after:.1f} times less" if after <= before else f"{after / before:.1f} times more"
        lines.append(f"at {length:,} tokens: {size(before)} before, {size(after)} after, {change}")
    return lines


def _experts(config: Any) -> list[str]:
    """Of a mixture, how much of it is at work for a token."""
    from linearize.errors import UnsupportedModelError
    from linearize.models import experts
    from linearize.surgery.inspection import skeleton

    model = skeleton(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    try:
        active = experts.active(model)
    except UnsupportedModelError as error:
        return [f"experts     {error}"]
    if active == total:
        return []
    return [
        f"experts     {active:,} of {total:,} parameters are at work for a token; surgery leaves experts alone"
    ]


def _others(plan: Plan) -> list[str]:
    """A line for each class of layers that hold no attention."""
    from linearize.config.words import ranges

    classes: dict[str, list[int]] = {}
    for path, name in plan.others.items():
        classes.setdefault(name, []).append(int(path.rpartition(".")[2]))
    return [
        f"left as is  {ranges(numbers)} of the model's layers hold no attention ({name})"
        for name, numbers in classes.items()
    ]


def _break_even(plan: Plan) -> list[str]:
    """From which length the states take less than the caches, and in which layers they never do."""
    windows = sorted({row.kv_window for row in plan.shrinking if row.kv_window is not None})
    lines = []
    if windows:
        words = " or ".join(f"{window:,}" for window in windows)
        capped = sum(row.kv_window is not None for row in plan.shrinking)
        lines.append(
            f"            ({capped} of the layers keep at most {words} tokens, the teacher's own window)"
        )
    if plan.break_even is None:
        lines.append("break-even  never: the teacher's windows keep its cache smaller than the states")
        return lines
    lines.append(f"break-even  {plan.break_even:,} tokens: a longer context takes less memory than before")
    never = [row for row in plan.shrinking if row.break_even is None]
    for layers, row in grouped(never):
        lines.append(
            f"            not in layers {layers}: a state of {size(row.state_bytes)} never beats a cache of at most "
            f"{size(row.kv_bytes(row.kv_window or 0))}; `layers:` can leave them as they are"
        )
    return lines
