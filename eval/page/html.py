"""The page as one HTML file that opens offline: charts by plotly.js, which the file carries.

Everything that was found in a file or written by a model goes through jinja's escaping; the charts' data is JSON with
every `<`, `>` and `&` as an escape, and a content security policy lets no script run but the two that stand here.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from linearize.errors import LinearizeError
from linearize.eval import tables
from linearize.eval.page.blocks import Chart, Page, Table
from linearize.eval.page.figures import figure
from linearize.extras import install

FOLDER = Path(__file__).parent
DRAW = """\
const charts = JSON.parse(document.getElementById('charts').textContent);
const draw = (box) => Plotly.newPlot(box, charts[box.dataset.chart].data, charts[box.dataset.chart].layout,
                                     {displayModeBar: false, responsive: true});
document.querySelectorAll('[data-chart]').forEach(draw);
window.addEventListener('load', () => { document.documentElement.dataset.drawn = 'yes'; });
"""
_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def render(page: Page) -> str:
    """The whole file.

    Raises:
        LinearizeError: plotly is missing.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise LinearizeError(
            f"the HTML page needs plotly, which is not installed: {install('page')} (the markdown beside it "
            "holds the same numbers)"
        ) from error
    charts: list[dict[str, Any]] = []

    def chart(block: Any) -> int:
        charts.append(figure(block))
        return len(charts) - 1

    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": tables.number}
    library = get_plotlyjs()
    body = environment.get_template("page.html.jinja").render(
        page=page,
        chart=chart,
        columns=columns,
        kind=lambda block: type(block).__name__,
        alone=lambda section: sum(isinstance(block, Chart) for block in section.blocks) == 1,
        charts=lambda: Markup(_json(charts)),  # called last, when every chart has its place
        plotly=Markup(library),
        draw=Markup(DRAW),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; "
        f"script-src {_digest(library)} {_digest(DRAW)}",
    )
    return body


def columns(table: Table) -> list[tuple[str, bool]]:
    """(heading, whether it holds numbers) of a table."""
    names = dict.fromkeys(name for row in table.rows for name in row)
    return [(name, tables.is_numeric(table.rows, name)) for name in names]


def _digest(script: str) -> str:
    """As a policy names a script that stands in the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _json(value: Any) -> str:
    text = json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)
    return "".join(_UNSAFE.get(character, character) for character in text)


def _plain(value: Any) -> Any:
    """Without NaN and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not (float("-inf") < value < float("inf")):
        return None
    return value
