"""The pictures of a run: loss of each layer in transfer, loss of each stage against tokens, perplexities as bars.

Drawn with matplotlib's Agg canvas on figures of their own, so that nothing global (backend, style) is touched. Colors
are Okabe and Ito's, which stay apart under every common form of color blindness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from linearize.eval.tables import number
from linearize.progress import count

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito 2008, darkest first."""
FEW = 40
"""Up to this many points a curve is drawn as it is, beyond that with its running mean."""
RATES = ("lr", "lr_mixers")
SCHEDULED = (*RATES, "batch_size", "length", "window_dropout")
"""Fields of a line that may change within a stage; all but the rates stand there only where they do."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

Metrics = Sequence[Mapping[str, Any]]


def layer_loss(metrics: Metrics, path: Path, layers: Sequence[int] | None = None) -> Path | None:
    """Loss of every layer at the first, the middle and the last logged step of the stages that log it.

    Args:
        metrics: lines of metrics.jsonl; those with "layers" count.
        path: PNG to write.
        layers: numbers of the layers in the model, in the order of a line's entries; by default 0, 1, ...

    Returns:
        The path, or None when no line has per-layer losses.
    """
    lines = [line for line in metrics if line.get("layers")]
    if not lines:
        return None
    picked = list(dict.fromkeys([0, len(lines) // 2, len(lines) - 1]))
    figure, axes = new_figure(7.2, 3.8)
    # From pale to dark as training goes on, and a marker each: order and identity without color.
    for index, color, marker in zip(picked, ("#56B4E9", "#E69F00", "#000000"), MARKERS, strict=False):
        line = lines[index]
        numbers = layers if layers is not None else range(len(line["layers"]))
        label = f"{count(line.get('tokens', 0))} tokens"
        axes.plot(numbers, line["layers"], marker=marker, ms=4, lw=1.6, color=color, label=label)
    if all(value > 0 for index in picked for value in lines[index]["layers"]):
        _log_y(axes)
    axes.set_xlabel("converted layer, from the input" if layers is None else "layer of the model")
    axes.set_ylabel("transfer loss (log scale)" if axes.get_yscale() == "log" else "transfer loss")
    axes.set_title("Attention transfer: loss of each layer", loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, ncols=3, loc="best")
    return save(figure, path)


def loss_curves(metrics: Metrics, path: Path) -> Path | None:
    """Loss of each stage against the tokens that it trained on, one panel a stage (their losses have other units).

    Returns:
        The path, or None when no line has a loss.
    """
    stages: dict[str, list[tuple[float, float]]] = {}
    for line in metrics:
        loss = line.get("loss")
        if isinstance(loss, int | float) and math.isfinite(loss):
            stages.setdefault(str(line.get("stage", "stage")), []).append((line.get("tokens", 0), loss))
    if not stages:
        return None
    figure = Figure(figsize=(max(4.5, 3.8 * len(stages)), 3.4), layout="constrained")
    panels = figure.subplots(1, len(stages), squeeze=False)[0]
    for panel, (stage, points), color in zip(panels, stages.items(), COLORS * len(stages), strict=False):
        clean(panel)
        at, losses = zip(*sorted(points), strict=True)
        if len(at) <= FEW:
            panel.plot(at, losses, color=color, lw=1.6, marker="o", ms=3)
        else:
            panel.plot(at, losses, color=color, lw=0.8, alpha=0.45)
            panel.plot(at, _smooth(losses), color=color, lw=2.0)
        if min(losses) > 0 and max(losses) / min(losses) > 3:
            _log_y(panel)
        panel.set_title(stage, loc="left")
        panel.set_xlabel("training tokens")
        panel.set_ylabel("loss (log scale)" if panel.get_yscale() == "log" else "loss")
        panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    return save(figure, path)


def schedules(metrics: Metrics, path: Path) -> Path | None:
    """What changed within the stages, against their tokens: a row for each value, a column for each stage.

    Args:
        metrics: lines of metrics.jsonl; `SCHEDULED` fields count.
        path: PNG to write.

    Returns:
        The path, or None when no line has any of the fields but learning rates.
    """
    found = {
        name: [line for line in metrics if isinstance(line.get(name), int | float)] for name in SCHEDULED
    }
    found = {name: lines for name, lines in found.items() if lines}
    if not set(found) - set(RATES):
        return None
    stages = list(
        dict.fromkeys(str(line.get("stage", "stage")) for lines in found.values() for line in lines)
    )
    figure = Figure(figsize=(max(4.5, 3.8 * len(stages)), 1.9 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), len(stages), squeeze=False)
    for row, (name, lines), color in zip(panels, found.items(), COLORS, strict=False):
        for panel, stage in zip(row, stages, strict=True):
            own = [line for line in lines if line.get("stage", "stage") == stage]
            if not own:
                panel.set_visible(False)
                continue
            clean(panel)
            at = [line.get("tokens", 0) for line in own]
            drawn = "default" if name in RATES else "steps-pre"
            panel.plot(at, [line[name] for line in own], color=color, lw=1.6, drawstyle=drawn)
            panel.set_title(stage, loc="left")
            panel.set_ylabel(name.replace("_", " "))
            panel.set_xlabel("training tokens")
            panel.set_ylim(bottom=0)
            panel.xaxis.set_major_locator(MaxNLocator(4))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    return save(figure, path)


def perplexity_bars(rows: Sequence[Mapping[str, Any]], path: Path) -> Path | None:
    """Perplexity of each row of results.json on each text, on a log scale, its value beside the bar.

    Returns:
        The path, or None when no row has a perplexity.
    """
    values = {str(row.get("name", "")): _perplexities(row) for row in rows}
    values = {name: found for name, found in values.items() if found}
    if not values:
        return None
    texts = list(dict.fromkeys(text for found in values.values() for text in found))
    names = list(values)
    height = 0.8 / len(texts)
    figure, axes = new_figure(7.2, 1.1 + 0.34 * len(names) * max(1.0, 0.62 * len(texts)))
    finite = [value for found in values.values() for value in found.values() if 0 < value < math.inf]
    low, high = (min(finite), max(finite)) if finite else (1.0, 1.0)
    if high > 5 * low:
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
        low, high = 0.7 * low, 1.8 * high
    else:
        low, high = 0.0, 1.15 * high
    axes.set_xlim(low, high)
    for index, (text, color) in enumerate(zip(texts, COLORS * len(texts), strict=False)):
        at = [place + (index - (len(texts) - 1) / 2) * height for place in range(len(names))]
        found = [values[name].get(text) for name in names]
        # A diverged model has no bar, but its "inf" or "nan" stands where the bar would end.
        ends = [value if value is not None and 0 < value < math.inf else low for value in found]
        axes.barh(at, [end - low for end in ends], left=low, height=0.9 * height, color=color, label=text)
        for place, end, value in zip(at, ends, found, strict=True):
            axes.annotate(
                number(value), (end, place), (4, 0), textcoords="offset points", va="center", size=8
            )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("perplexity, lower is better" + (" (log scale)" if axes.get_xscale() == "log" else ""))
    if len(texts) > 1:
        axes.legend(
            frameon=False, ncols=len(texts), loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2
        )
    else:
        axes.set_title(texts[0], loc="left")
    return save(figure, path)


def _perplexities(row: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for text, value in (row.get("perplexity") or {}).items():
        value = value.get("value") if isinstance(value, Mapping) else value
        if isinstance(value, int | float):
            found[text] = float(value)
    return found


def _smooth(values: Sequence[float]) -> list[float]:
    """Running mean over a twentieth of the curve; symmetric and narrowing at the start, where the loss is steep."""
    half = max(1, len(values) // 40)
    out = []
    for index in range(len(values)):
        piece = values[index - min(half, index) : index + min(half, max(index, 1)) + 1]
        out.append(sum(piece) / len(piece))
    return out


def new_figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    clean(axes)
    return figure, axes


def clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#DDDDDD", lw=0.6)
    axes.set_axisbelow(True)


def _log_y(axes: Any) -> None:
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)


def _plain_numbers(axis: Any) -> None:
    """Ticks at 1, 2 and 5 of each decade in plain digits: a short log axis has no power of ten to label."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=160, facecolor="white")
    return path
