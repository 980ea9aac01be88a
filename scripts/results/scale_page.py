"""The tables of docs/results/scale-h200x2.md and docs/scale.md, from scale-h200x2.json.

python scripts/results/scale_page.py [ROWS.json]    # rows of `scripts/scale.py`, which are joined first
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from linearize.bench.subjects import SHAPES
from linearize.eval import tables

DOCS = Path(__file__).resolve().parents[2] / "docs"
ROWS, PAGE, GUIDE = (
    DOCS / "results" / "scale-h200x2.json",
    DOCS / "results" / "scale-h200x2.md",
    DOCS / "scale.md",
)
TARGET = 1.85
"""Issue 15: times one card, of two."""
STAGES = {"transfer": "transfer", "lora_kl": "LoRA + KL", "all_kl": "all weights + KL"}
KEY = ("shape", "stage", "processes", "shard", "length", "sequence", "recipe")

Row = dict[str, Any]


def main(arguments: list[str]) -> int:
    """Join, and write both pages."""
    there = json.loads(ROWS.read_text(encoding="utf-8"))
    for path in arguments:
        new = json.loads(Path(path).read_text(encoding="utf-8"))
        there = {**there, **new, "rows": joined(there["rows"], new["rows"])}
    ROWS.write_text(json.dumps(there, indent=1) + "\n", encoding="utf-8")
    for page in (PAGE, GUIDE):
        page.write_text(written(page.read_text(encoding="utf-8"), there["rows"]), encoding="utf-8")
    return 0


def joined(before: list[Row], new: list[Row]) -> list[Row]:
    """New rows take the place of those of the same measurement, but a row without a figure none of one that has one."""
    from_now = [row for row in new if _says(row) or not any(_key(row) == _key(old) for old in before)]
    known = {_key(row) for row in from_now}
    return [row for row in before if _key(row) not in known] + from_now


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(({"sequence": 1, "recipe": "lolcats"} | row)[name] for name in KEY)


def _says(row: Row) -> bool:
    """Whether it is a figure, or that memory ran out."""
    return bool(row["tokens_per_second"]) or row["note"].startswith("out of memory")


def written(page: str, rows: list[Row]) -> str:
    """A page with the tables whose marks it has made anew.

    Args:
        page: text in which a table stands between `<!-- NAME -->` and `<!-- /NAME -->`.
        rows: of the file.

    Raises:
        ValueError: the page has no marks at all.
    """
    found = 0
    for name, table in {"scaling": scaling(rows), "rows": every(rows), "beyond": beyond(rows)}.items():
        page, count = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda mark, table=table: f"{mark[1]}{table}\n{mark[2]}",
            page,
            flags=re.S,
        )
        found += count
    if not found:
        raise ValueError("the page has no place for a table")
    return page


def scaling(rows: list[Row]) -> str:
    """What one card and two make of the same stage, with as many tokens a step for each."""
    shown = []
    for row in sorted(rows, key=_order):
        one = _alone(row, rows)
        if row["processes"] == 1 or one is None or row.get("sequence", 1) > 1:
            continue
        times = row["tokens_per_second"] / one["tokens_per_second"]
        shown.append(
            {
                "shape": row["shape"],
                "stage": STAGES[row["stage"]],
                "tokens a step and card": f"{row['batch'] // row['processes']} x {row['length']:,}",
                "one card, tokens/s": f"{one['tokens_per_second']:,.0f}",
                f"{row['processes']} cards, tokens/s": f"{row['tokens_per_second']:,.0f}",
                "times": f"{times:.2f}",
                f"target {TARGET}": "reached"
                if times >= TARGET
                else f"missed by {100 * (1 - times / TARGET):.0f} %",
            }
        )
    return tables.markdown(shown) if shown else "No stage has a row of one card and one of two yet."


def _alone(row: Row, rows: list[Row]) -> Row | None:
    """The row of one card with as many tokens a step for it."""
    if row["shard"] != "none" or not row["tokens_per_second"]:
        return None
    own = row["batch"] // row["processes"]
    same = [
        other
        for other in rows
        if other["processes"] == 1
        and other["tokens_per_second"]
        and (other["shape"], other["stage"], other["length"], other["batch"])
        == (row["shape"], row["stage"], row["length"], own)
    ]
    return same[-1] if same else None


def beyond(rows: list[Row]) -> str:
    """What two cards hold together: weights in shards, a sequence in two."""
    many = {
        (r["shape"], r["stage"], r["length"])
        for r in rows
        if r["shard"] == "full" or r.get("sequence", 1) > 1
    }
    shown = [
        {
            "shape": row["shape"],
            "recipe": row.get("recipe", "lolcats"),
            "stage": STAGES[row["stage"]],
            "cards": row["processes"],
            "together": _together(row),
            "tokens a step": f"{row['batch']} x {row['length']:,}",
            "tokens/s": f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else "out of memory",
            "GiB a card": f"{row['peak_gib']:.1f}" if row["peak_gib"] else "",
        }
        for row in sorted(rows, key=_order)
        if (row["shape"], row["stage"], row["length"]) in many and _says(row)
    ]
    return tables.markdown(shown)


def _together(row: Row) -> str:
    words = ["weights in shards"] * (row["shard"] == "full") + ["each sequence"] * (
        row.get("sequence", 1) > 1
    )
    return " and ".join(words)


def every(rows: list[Row]) -> str:
    """All rows as they were measured."""
    shown = [
        {
            "shape": row["shape"],
            "stage": row["stage"],
            "cards": row["processes"],
            "shards": row["shard"],
            "cards a sequence": row.get("sequence", 1),
            "batch": row["batch"],
            "length": f"{row['length']:,}",
            "at once": row.get("micro_batch", ""),
            "tokens/s": f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else "",
            "ms": row.get("milliseconds", ""),
            "GiB a card": row["peak_gib"] or "",
            "recorded": _yes(row, "recorded"),
            "compiled": _yes(row, "compiled"),
            "commit": row.get("commit", ""),
            "note": row["note"][:60],
        }
        for row in sorted(rows, key=_order)
    ]
    return tables.markdown(shown)


def _yes(row: Row, key: str) -> str:
    return "yes" if row.get(key) else "no" if key in row else ""


def _order(row: Row) -> tuple[Any, ...]:
    return (
        list(SHAPES).index(row["shape"]),
        row["length"],
        list(STAGES).index(row["stage"]),
        row["processes"],
        row["shard"],
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
