"""The leaderboard as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from conversions import Row, controls, ranked, ratio
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from linearize.eval.plots import COLORS, MARKERS, new_figure, save


def picture(rows: dict[str, Row], path: Path, unjudged: Mapping[str, Row] | None = None) -> None:
    """Ratio of perplexities of every recipe, of each text and their mean, and the untrained window as a line.

    Args:
        rows: of the leaderboard.
        path: PNG to write.
        unjudged: rows whose perplexities are the runs' own; a star behind their names.
    """
    everything = {**rows, **{f"{name} *": row for name, row in (unjudged or {}).items()}}
    shown = [(name, row) for name, row in ranked(everything)[::-1] if math.isfinite(ratio(row))]
    if not shown:
        return
    figure, axes = new_figure(8, 1.2 + 0.24 * len(shown))
    texts = list(
        dict.fromkeys(_text(key) for _, row in shown for key in row["student"] if key.startswith("ppl"))
    )
    for place, (name, row) in enumerate(shown):
        student, teacher, color = row["student"], row["teacher"], COLORS[name.startswith("best_")]
        each = {
            _text(key): value / teacher[key]
            for key, value in student.items()
            if key.startswith("ppl") and teacher.get(key)
        }
        axes.plot([min(each.values()), max(each.values())], [place] * 2, color=color, lw=1.2, alpha=0.6)
        for key, marker in zip(texts, MARKERS[1:], strict=False):
            if key in each:
                label = key if not place else None
                axes.plot(each[key], place, marker, ms=4, mfc="white", mec=color, label=label)
        axes.plot(
            ratio(row), place, MARKERS[0], ms=6, color=color, label=None if place else "mean of the texts"
        )
        text = f"{ratio(row):.2f}" if ratio(row) < 100 else f"{ratio(row):,.0f}"
        axes.annotate(
            text, (max(each.values()), place), (7, 0), textcoords="offset points", va="center", fontsize=8,
            bbox={"fc": "white", "ec": "none", "pad": 0.5},
        )  # fmt: skip
    window = controls(rows).get("**swa_sinks, untrained**")
    if window:
        axes.axvline(ratio(window), color=COLORS[-1], ls="--", lw=1, label="swa_sinks, untrained", zorder=0)
    axes.axvline(1.0, color=COLORS[-1], lw=1, label="the teacher", zorder=0)
    axes.legend(loc="upper right", frameon=True, fontsize=8)
    axes.set_xscale("log")
    axes.margins(x=0.1)
    axes.set_ylim(-0.8, len(shown) - 0.2)
    axes.set_yticks(range(len(shown)), [name.replace("stages.", "") for name, _ in shown], fontsize=8)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    star = "; *: not judged, the run's own figures" if unjudged else ""
    axes.set_xlabel(f"perplexity over the teacher's (log scale{star})")
    save(figure, path)


def _text(key: str) -> str:
    """Name of the text that a perplexity is of, without the windows' length."""
    return key.removeprefix("ppl ").split(" ")[0]
