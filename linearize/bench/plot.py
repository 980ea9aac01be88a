"""Time against length of a sequence, forward on the left and forward + backward on the right, both axes logarithmic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from linearize.eval.plots import COLORS, MARKERS

SWEPT = "window_linear"
"""The operator that is timed at every length."""
OTHERS = {"linear_features": "linearize, no window", "gated_linear": "linearize, gated"}
"""Further operators of ours that are drawn where they were timed."""


def draw(rows: Sequence[dict[str, Any]], path: Path, title: str = "") -> Path | None:
    """Write the picture.

    Args:
        rows: of `report.to_json`.
        path: PNG to write.
        title: device and size.

    Returns:
        The path, or None when nothing was timed.
    """
    panels = [
        ("forward_ms", "forward_floor_ms", "forward"),
        ("both_ms", "both_floor_ms", "forward + backward"),
    ]
    curves = {key: _curves(rows, key) for key, _, _ in panels}
    if not any(curves.values()):
        return None
    names = list(dict.fromkeys(name for found in curves.values() for name in found))
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    for axes, (key, floor, heading) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for index, name in enumerate(names):
            points = sorted(curves[key].get(name, {}).items())
            if points:
                ours = name.startswith("linearize")
                axes.plot(
                    *zip(*points, strict=True), color=COLORS[index % len(COLORS)], marker=MARKERS[index % len(MARKERS)],
                    ms=5, lw=2.4 if ours else 1.4, label=name,
                )  # fmt: skip
        lowest = sorted({(row["length"], row[floor]) for row in rows if row["operator"] == SWEPT})
        if lowest:
            axes.plot(*zip(*lowest, strict=True), color="#888888", ls=":", lw=1.4, label="floor")
        lengths = sorted({length for found in curves[key].values() for length in found})
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1024:g}k"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, which="both", color="#E4E4E4", lw=0.6)
        axes.set_axisbelow(True)
        axes.set_title(heading, loc="left")
        axes.set_xlabel("tokens in a sequence")
        axes.set_ylabel("milliseconds")
    figure.axes[0].legend(frameon=False, fontsize=8)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=160, facecolor="white")
    return path


def _curves(rows: Sequence[dict[str, Any]], key: str) -> dict[str, dict[int, float]]:
    """Name of a curve -> length -> milliseconds."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row[key] is None:
            continue
        name = row["contender"] if row["operator"] == SWEPT else None
        if row["operator"] in OTHERS and row["kind"] == "ours":
            name = OTHERS[row["operator"]]
        if name is not None:
            found.setdefault(name, {})[row["length"]] = row[key]["median"]
    return found
