"""Charts as plotly figures: plain dictionaries of data and layout, for the plotly.js that the page carries.

Names come from files and models. Plotly reads a little HTML in its labels, so what could be markup is made an entity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from linearize.eval.page.blocks import Bars, Chart, Dots, Heat, Lines, Series
from linearize.eval.page.contestants import short
from linearize.eval.tables import number

Figure = dict[str, Any]

INK, GRID = "#1f2933", "#e4e7eb"
WHISKER = "#8a949e"
"""Seen on white and on every bar."""
HEIGHT = 300
TICKS = 6
"""Labels on an x axis that has its own."""
SPREAD = 5
"""From such a ratio of the longest bar to the shortest on, bars need a log axis."""
AXIS = {"gridcolor": GRID, "zeroline": False, "linecolor": "#9aa5b1", "automargin": True, "fixedrange": True}


def figure(chart: Chart) -> Figure:
    """Data, layout and height in pixels of a chart; its title stands outside, where it can wrap."""
    if isinstance(chart, Lines):
        return _lines(chart)
    if isinstance(chart, Dots):
        return _dots(chart)
    return _heat(chart) if isinstance(chart, Heat) else _bars(chart)


def label(name: str) -> str:
    """A name as plotly shows it, character by character."""
    return "".join({"&": "&amp;", "<": "&lt;", ">": "&gt;"}.get(character, character) for character in name)


def _lines(chart: Lines) -> Figure:
    data = [_trace(one, chart) for one in chart.series]
    x_axis: dict[str, Any] = {**AXIS, "title": {"text": label(chart.x_title), "standoff": 6}}
    if chart.log_x:
        x_axis |= {"type": "log", **_places(chart)}
    elif all(float(x).is_integer() for one in chart.series for x in (p.x for p in one.points)):
        x_axis |= {"tickformat": "d"}
    y_axis: dict[str, Any] = {**AXIS, "title": {"text": label(chart.y_title), "standoff": 6}}
    if chart.share:
        y_axis["range"] = [-4, 104]
    elif chart.log_y and all(p.y > 0 for one in chart.series for p in one.points):
        y_axis |= {"type": "log", **_decades([p.y for one in chart.series for p in one.points])}
    else:
        y_axis["rangemode"] = "tozero"
    return _whole(data, {"xaxis": x_axis, "yaxis": y_axis, "hovermode": "closest"})


def _trace(one: Series, chart: Lines) -> Figure:
    points = [point for point in one.points if _finite(point.y) and not (chart.log_y and point.y <= 0)]
    made: Figure = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": label(short(one.name)),
        "x": [point.x for point in points],
        "y": [point.y for point in points],
        "customdata": [point.label or number(int(point.x)) for point in points],
        "line": {"color": one.style.color, "dash": one.style.dash, "width": 2},
        "marker": {"symbol": one.style.marker, "size": 7},
        "hovertemplate": "%{customdata}: %{y:.4g}",
    }
    if any(_finite(point.low) and _finite(point.high) for point in points):
        made["error_y"] = {
            "type": "data", "symmetric": False, "array": [_reach(p.y, p.high) for p in points],
            "arrayminus": [_reach(p.low, p.y) for p in points], "thickness": 1, "width": 3,
        }  # fmt: skip
    return made


def _places(chart: Lines) -> Figure:
    """Ticks where something was measured, under the names of buckets where they have such."""
    named = {point.x: point.label or number(int(point.x)) for one in chart.series for point in one.points}
    places = sorted(named)
    if len(places) > TICKS:
        places = places[:: math.ceil(len(places) / TICKS)]
    room = 0.12
    low, high = math.log10(min(named)), math.log10(max(named))
    return {
        "tickmode": "array",
        "tickvals": places,
        "ticktext": [label(named[place]) for place in places],
        "range": [low - room, high + room],
    }


def _decades(values: Sequence[float]) -> Figure:
    """Ticks at 1, 2 and 5 of each decade in plain digits, as few as can be read."""
    finite = [value for value in values if _finite(value) and value > 0]
    if not finite:
        return {}
    span = math.log10(max(finite) / min(finite))
    low, high = math.floor(math.log10(min(finite))), math.ceil(math.log10(max(finite)))
    steps = (
        (1, 1.5, 2, 3, 5, 7) if span < 0.5 else (1, 2, 5) if span < 1.6 else (1, 3) if span < 2.6 else (1,)
    )
    ticks = [step * 10.0**power for power in range(low - 1, high + 1) for step in steps]
    return {"tickmode": "array", "tickvals": ticks, "ticktext": [f"{tick:,.6g}" for tick in ticks]}


def _dots(chart: Dots) -> Figure:
    """A lane for each series within a row, so that whiskers do not cover each other."""
    data: list[Figure] = []
    for place, one in enumerate(chart.series):
        lane = (place + 0.5) / len(chart.series) - 0.5
        points = [point for point in one.points if _finite(point.y)]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label(short(one.name)),
                "x": [point.y for point in points],
                "y": [point.x + 0.72 * lane for point in points],
                "customdata": [label(chart.rows[int(point.x)]) for point in points],
                "marker": {"color": one.style.color, "symbol": one.style.marker, "size": 8},
                "hovertemplate": "%{customdata}: %{x:.4g} %",
                "error_x": {
                    "type": "data", "symmetric": False, "thickness": 1, "width": 2, "color": one.style.color,
                    "array": [_reach(p.y, p.high) for p in points],
                    "arrayminus": [_reach(p.low, p.y) for p in points],
                },
            }
        )  # fmt: skip
    y_axis = {
        **AXIS, "tickmode": "array", "tickvals": list(range(len(chart.rows))),
        "ticktext": [label(short(row)) for row in chart.rows],
        "range": [len(chart.rows) - 0.5, -0.5], "showgrid": False,
    }  # fmt: skip
    x_axis = {**AXIS, "title": {"text": label(chart.x_title), "standoff": 6}, "range": [-3, 103]}
    between: list[Figure] = [
        {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": row - 0.5, "y1": row - 0.5,
         "line": {"color": GRID, "width": 1}, "layer": "below"}
        for row in range(1, len(chart.rows))
    ]  # fmt: skip
    layout = {"xaxis": x_axis, "yaxis": y_axis, "hovermode": "closest", "shapes": between}
    return _whole(data, layout, height=70 + len(chart.rows) * max(26, 11 * len(chart.series)))


def _heat(chart: Heat) -> Figure:
    shown = [[None if value is None else round(100 * value) for value in row] for row in chart.values]
    data = [
        {
            "type": "heatmap",
            "x": [label(column) for column in chart.columns],
            "y": [label(row) for row in chart.rows],
            "z": shown,
            "zmin": 0,
            "zmax": 100,
            "colorscale": "Cividis",
            "showscale": False,
            "xgap": 2,
            "ygap": 2,
            "text": [["" if value is None else str(value) for value in row] for row in shown],
            "texttemplate": "%{text}",
            "hovertemplate": "%{x} tokens, depth %{y}: %{z} %<extra></extra>",
        }
    ]
    axes = {
        "xaxis": {**AXIS, "type": "category", "title": {"text": "tokens of context", "standoff": 6}},
        "yaxis": {
            **AXIS, "type": "category", "autorange": "reversed", "title": {"text": "depth", "standoff": 6},
        },
    }  # fmt: skip
    return _whole(data, axes, height=110 + 26 * max(len(chart.rows), 3))


def _bars(chart: Bars) -> Figure:
    bars = [bar for bar in chart.bars if _finite(bar.value) and not (chart.log and bar.value <= 0)]
    data: list[Figure] = [
        {
            "type": "bar",
            "orientation": "h",
            "x": [bar.value for bar in bars],
            # categories of one name would be one bar
            "y": list(range(len(bars))),
            "marker": {"color": [bar.style.color for bar in bars]},
            "text": [f"<b>{number(bar.value)}</b>" for bar in bars],
            "textposition": "inside",
            "insidetextanchor": "start",
            "textangle": 0,
            "constraintext": "none",
            "insidetextfont": {"color": "white"},
            "hovertemplate": "%{customdata}: %{x:.4g}<extra></extra>",
            "customdata": [label(bar.name) for bar in bars],
            "error_x": {
                "type": "data", "symmetric": False, "thickness": 1.4, "width": 4, "color": WHISKER,
                "array": [_reach(bar.value, bar.high) for bar in bars],
                "arrayminus": [_reach(bar.low, bar.value) for bar in bars],
            },
        }
    ]  # fmt: skip
    x_axis: Figure = {**AXIS, "title": {"text": label(chart.x_title), "standoff": 6}}
    if chart.share:
        x_axis["range"] = [0, 104]
    elif chart.log and bars and max(bar.value for bar in bars) > SPREAD * min(bar.value for bar in bars):
        ends = [end for bar in bars for end in (bar.value, bar.high) if end is not None and _finite(end)]
        low, high = min(bar.value for bar in bars) / 4, max(ends) * 1.15  # room for the shortest bar's number
        x_axis |= {"type": "log", "range": [math.log10(low), math.log10(high)], **_decades(ends)}
    names = [label(short(bar.name)) for bar in bars]
    if chart.share:  # a bar of 0 has no room for its number
        data[0]["textposition"] = "none"
        names = [
            f"{name}  <b>{number(round(bar.value))} %</b>" for name, bar in zip(names, bars, strict=True)
        ]
    y_axis = {
        **AXIS, "tickmode": "array", "tickvals": list(range(len(bars))), "ticktext": names,
        "autorange": "reversed", "showgrid": False,
    }  # fmt: skip
    return _whole(data, {"xaxis": x_axis, "yaxis": y_axis, "bargap": 0.25}, height=90 + 34 * len(bars))


def _whole(data: Sequence[Figure], layout: Figure, height: int = HEIGHT) -> Figure:
    return {
        "data": list(data),
        "layout": {
            **layout,
            "height": height,
            "showlegend": False,
            "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
            "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
        },
    }


def _reach(low: float | None, high: float | None) -> float:
    """Length of half an interval; 0 where it has no end."""
    return max(high - low, 0.0) if low is not None and high is not None and _finite(high - low) else 0.0


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
