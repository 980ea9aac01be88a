"""What was chosen, for the terminal: layers, greedy steps, placements at equal budget, and a verdict in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from linearize.eval.rows import Score
from linearize.eval.tables import Fitted
from linearize.select.job import GREEDY, UNIFORM, Selection
from linearize.select.samples import KL, KL_HIT, KL_PASSKEY

TITLES = {KL: "KL", KL_HIT: "recalled", KL_PASSKEY: "passkey"}
RANDOM = "random"
UNSURE = 1.0
"""Nats a token of a pass key, above which the teacher does not know it: digits alone have ln 10 = 2.3."""


def tables(found: Selection) -> RenderableType:
    """All of a selection, KL in nats a token."""
    return Group(
        Fitted(_layers(found), "KL to the teacher with one layer converted, and with one restored"),
        Fitted(_steps(found), "Greedy: restored from all converted, on the windows that chose"),
        Fitted(_unseen(found), f"Placements at equal budget, {TITLES[found.by]}, on other windows"),
        Text("\n".join(["", *verdicts(found), ""])),
    )


def verdicts(found: Selection) -> list[str]:
    """Sentences: the layers, and whether choosing them was worth it."""
    listed = ", ".join(map(str, found.kept))
    get = f"s {listed} get" if len(found.kept) > 1 else f" {listed} gets"
    lines = [f"Layer{get} {found.give}." if found.give else f"Softmax stays in {listed}."]
    for name, row in found.differences.items():
        if found.placements[name][-1] == found.kept:
            lines.append(f"{name.capitalize()} takes the same layers.")
            continue
        if row.low is None or row.high is None or row.low <= 0 <= row.high:
            word = "cannot be told apart from"
        else:
            word = "is better than" if row.high < 0 else "is WORSE than"
        ends = "" if row.low is None or row.high is None else f", 95 %: {row.low:+.4f} to {row.high:+.4f}"
        lines.append(f"Greedy {word} {name} on other windows ({row.value:+.4f} nats a token{ends}).")
    if found.teacher is not None and not found.teacher.value <= UNSURE:
        lines.append(
            f"The teacher itself does not know the pass keys ({found.teacher.value:.2f} nats a token): passkey says "
            "little here."
        )
    return lines


def _layers(found: Selection) -> list[dict[str, Any]]:
    order = {step.layer: place for place, step in enumerate(found.steps, start=1)}
    first = found.steps[0].scores
    return [
        {
            "layer": layer,
            **_metrics(scores, found.by),
            "restored alone": f"{first[layer]:.4f}",
            "stays": _ordinal(order[layer]) if layer in order else "",
        }
        for layer, scores in found.alone.items()
    ]


def _steps(found: Selection) -> list[dict[str, Any]]:
    rows = [{"kept": 0, "restored": "", **_metrics(found.converted, found.by)}]
    for kept, (step, scores) in enumerate(zip(found.steps, found.chosen, strict=True), start=1):
        rows.append({"kept": kept, "restored": str(step.layer), **_metrics(scores, found.by)})
    return rows


def _metrics(scores: Mapping[str, Score], by: str) -> dict[str, str]:
    """A column for each metric, with its interval where layers were chosen by it."""
    made = {}
    for metric, row in scores.items():
        made[TITLES[metric]] = _kl(row)
        if metric == by:
            made["95%"] = _ends(row)
    return made


def _unseen(found: Selection) -> list[dict[str, Any]]:
    names = [name for name in found.unseen if not name.startswith(RANDOM)]
    draws = [name for name in found.unseen if name.startswith(RANDOM)]
    made = []
    for kept in range(len(found.steps) + 1):
        row: dict[str, Any] = {"kept": kept}
        for name in names:
            row[name] = _kl(found.unseen[name][kept])
            if name in (GREEDY, UNIFORM):
                row["95%" if name == GREEDY else "95% "] = _ends(found.unseen[name][kept])
        values = sorted(found.unseen[name][kept].value for name in draws)
        if values:
            row[f"{RANDOM} x{len(values)}"] = _range(values)
        made.append(row)
    return made


def _range(values: Sequence[float]) -> str:
    low, high = (f"{value:.4f}" for value in (values[0], values[-1]))
    return low if low == high else f"{low} to {high}"


def _kl(row: Score) -> str:
    return "" if math.isnan(row.value) else f"{row.value:.4f}"


def _ends(row: Score) -> str:
    return "" if row.low is None or row.high is None else f"{row.low:.4f} {row.high:.4f}"


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
