"""The picture of a choice: what each layer costs alone, and KL against the number of layers that stay softmax."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from linearize.eval.plots import COLORS, MARKERS, clean, save
from linearize.select.job import GREEDY, Selection
from linearize.select.samples import KL, KL_HIT, KL_PASSKEY

NAMES = {
    KL: "KL to the teacher, nats a token",
    KL_HIT: "KL at repeated pairs, nats a token",
    KL_PASSKEY: "KL at pass keys, nats a token",
}


def draw(found: Selection, path: Path) -> Path:
    """Write the picture.

    Args:
        found: the selection.
        path: PNG to write.
    """
    figure = Figure(figsize=(10.5, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for axes in (left, right):
        clean(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(NAMES[found.by])
    for stays, color, label in ((False, COLORS[4], "converted"), (True, COLORS[1], "chosen to stay softmax")):
        layers = [layer for layer in found.layers if (layer in found.kept) == stays]
        scores = [found.alone[layer][found.by] for layer in layers]
        values = [row.value for row in scores]
        below = [max(0.0, row.value - (row.value if row.low is None else row.low)) for row in scores]
        above = [max(0.0, (row.value if row.high is None else row.high) - row.value) for row in scores]
        left.bar(layers, values, color=color, label=label, hatch="//" if stays else None, edgecolor="white")
        left.errorbar(layers, values, yerr=[below, above], fmt="none", ecolor="#333333", elinewidth=0.9)
    left.set_xlabel("layer converted alone")
    left.set_title("What each layer costs alone", loc="left")
    left.legend(frameon=False, ncols=2, loc="upper left")
    left.set_ylim(0, 1.15 * left.get_ylim()[1])  # the legend's room
    others = [name for name in found.unseen if name.startswith("random")]
    named = [name for name in found.unseen if name not in others]
    for name in [*others, *reversed(named)]:  # greedy is drawn last, on top
        values = [row.value for row in found.unseen[name]]
        style = (
            {"color": "#BBBBBB", "lw": 1.0, "label": "random" if name == others[0] else None}
            if name in others
            else {
                "color": COLORS[named.index(name)],
                "marker": MARKERS[named.index(name)],
                "ms": 4,
                "lw": 2.0 if name == GREEDY else 1.4,
                "label": name,
            }
        )
        right.plot(range(len(values)), values, **style)
    right.set_xlabel("layers that stay softmax")
    right.set_title("Placements, on other windows", loc="left")
    right.legend(frameon=False)
    return save(figure, path)
