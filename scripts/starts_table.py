"""The sheets of `starts.py`: several in one, and the rows as markdown."""

from __future__ import annotations

import json
from typing import Any

from sheet import ROOT, number

SPEEDS = "bf16, compiled, captured"
"""Way of the bench whose tokens/s the tables show: replayed from a CUDA graph, as a run has it."""


MEASURED = ("swapped", "calibrated", "after")
"""What a row has of perplexities."""
PUBLISHED = "after, published start"
"""The same after training from the swapped model; it may come from a sheet of its own, with a commit of its own."""


def join(found: dict[str, Any], sheets: list[dict[str, Any]]) -> None:
    """Sheets of one model and the same texts in one: the newest row under its recipe's name, older ones beside it.

    A row that was cut before its training does not take the place of a trained one, and an older one that says nothing
    else than the newer is left out. Trainings from the published start are put into the newest row, with their commit.

    Args:
        found: filled, in place.
        sheets: what `--out` wrote, joined ones too, the oldest first.
    """
    settings = [
        json.dumps([sheet["settings"], sheet.get("teacher") or sheets[0]["teacher"]]) for sheet in sheets
    ]
    if len(set(settings)) > 1:
        raise SystemExit("these sheets were made with other settings, or have another teacher")
    rows: dict[str, dict[str, Any]] = {}
    runs: list[dict[str, Any]] = []
    notes: list[str] = []
    published: dict[str, dict[str, Any]] = {}
    for sheet in sheets:
        for name, row in sheet["rows"].items():
            row = {"commit": sheet["commit"], **row}
            if PUBLISHED in row:
                published[name] = {PUBLISHED: row.pop(PUBLISHED)}
                published[name]["published commit"] = row.pop("published commit", row["commit"])
            if not any(row.get(key) for key in (*MEASURED, "judged")):
                continue
            if name in rows:
                new, old = (
                    (row, rows[name])
                    if row.get("after") or not rows[name].get("after")
                    else (rows[name], row)
                )
                if _says_more(old, new):
                    rows[f"{name} @{old['commit']}"] = old
                elif "note" in old:
                    new.setdefault("note", old["note"])
                row = new
            rows[name] = row
        made = sheet.get("runs") or [{key: sheet[key] for key in ("command", "date", "commit")}]
        runs += [run for run in made if run not in runs]
        notes += [note for note in sheet.get("notes", []) if note not in notes]
    newest = {name: rows[_recipe_of(name)] for name in rows}
    rows = {name: row for name, row in rows.items() if row is newest[name] or _says_more(row, newest[name])}
    for name, made in published.items():
        rows.setdefault(name, {"commit": made["published commit"]}).update(made)
    found |= {key: sheets[-1][key] for key in ("command", "date", "commit", "settings")}
    found |= {"teacher": sheets[0]["teacher"], "runs": runs, "rows": rows} | (
        {"notes": notes} if notes else {}
    )


def _says_more(row: dict[str, Any], than: dict[str, Any]) -> bool:
    return any(row.get(key) and row[key] != than.get(key) for key in MEASURED) or (
        "judged" in row and "judged" not in than
    )


def table(found: dict[str, Any]) -> str:
    """The rows as markdown, worst calibrated start last."""
    texts = list(found["teacher"])
    keys = [
        ("swapped", "swapped"),
        ("calibrated", "calibrated"),
        (PUBLISHED, "trained from the swap"),
        ("after", "trained from the calibrated start"),
    ]
    keys = [(key, title) for key, title in keys if any(row.get(key) for row in found["rows"].values())]
    titles = ["recipe", *(f"{title}, {text}" for text in texts for _, title in keys)]
    titles += ["seconds", "state KiB", "tokens/s"]
    titles += ["commit"] if found.get("runs") else []
    speeds = _speeds()
    made = [
        f"`{run['command']}`, {run['date']}, commit {run['commit']}" for run in found.get("runs", [found])
    ]
    lines = [
        f"# Where every recipe starts: {found['settings']['model']}",
        "",
        "; ".join(made) + ". Perplexity on "
        f"{found['settings']['windows']} windows of {found['settings']['length']} tokens of each text; the teacher has "
        + ", ".join(f"{value} ({text})" for text, value in found["teacher"].items())
        + ". Seconds are those of the calibration; state is one sequence's, in bfloat16, less softmax layers' caches; "
        f"tokens/s forward and backward of the whole model at 64 x 1,024, way `{SPEEDS}` of "
        "[recipes-h200.json](recipes-h200.json).",
        "",
        "| " + " | ".join(titles) + " |",
        "|---" + "|---:" * (len(titles) - 1) + "|",
    ]
    rows = found["rows"]
    newest = {key: rows[_recipe_of(key)] for key in rows}
    for key, row in sorted(rows.items(), key=lambda pair: (_rank(newest[pair[0]]), pair[0])):
        name = _recipe_of(key)
        if any(row.get(key) for key, _ in keys):
            cells = [number((row.get(column) or {}).get(text)) for text in texts for column, _ in keys]
            kib = f"{row['state_bytes'] / 1024:,.0f}" if row.get("state_bytes") else ""
            cells += [str(row.get("seconds", "")), kib, speeds.get(name, "")]
            cells += [row["commit"]] if found.get("runs") else []
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    notes = [
        f"{_recipe_of(key)} ({row['commit']}): {row['note']}" for key, row in rows.items() if row.get("note")
    ]
    return "\n".join([*lines, *(f"\n{note}" for note in [*found.get("notes", []), *notes])]) + "\n"


def _recipe_of(key: str) -> str:
    """The recipe of a row, whose key has the commit behind it where a newer row has the recipe's name."""
    return key.split(" @")[0]


def _speeds() -> dict[str, str]:
    path = ROOT / "docs" / "results" / "recipes-h200.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    wanted = ("train", SPEEDS, 64, 1024)
    chosen = [
        row
        for row in rows
        if (row["measured"], row["way"], row["batch"], row["length"]) == wanted and row["tokens_per_second"]
    ]
    return {row["recipe"]: f"{row['tokens_per_second']:,.0f}" for row in chosen}


def _rank(row: dict[str, Any]) -> float:
    measured = row.get("calibrated") or row.get("swapped") or row.get("after") or row.get(PUBLISHED)
    return float(max((measured or {"": 0.0}).values()))
