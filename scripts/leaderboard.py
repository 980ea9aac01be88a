"""Every shipped recipe at the same minutes of training on the same card, judged alike: rows as they come, resumable.

    python scripts/leaderboard.py --minutes 10 --text wikitext2=wikitext2.test.parquet
    python scripts/leaderboard.py --recipes best_constant,lolcats --minutes 1 --jobs 8    # one recipe a GPU
    python scripts/leaderboard.py --tokens 1M               # where cards are shared, so that minutes are not alike
    python scripts/leaderboard.py --starts mixers-h200.json # rows of `starts.py --train 1M --judge SUITE`

Writes leaderboard.json, .md and .png in docs/results (`--out`); what is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from conversions import (
    Conversion,
    Row,
    columns,
    controls,
    failures,
    intervals,
    made,
    ranked,
    ratio,
    titles,
)
from leaderboard_picture import picture
from sheet import ROOT, Sheet, markdown, number

from linearize.config import compose, list_recipes
from linearize.config.budget import parse
from linearize.config.compose import is_file_name
from linearize.errors import LinearizeError

LEFT_OUT = ("demo", "softmax", "swa_sinks", "mamba_in_llama_dpo")
"""Not by default: another's budget, the teacher itself, a control of every row, and one that wants pairs of answers."""


def main(arguments: list[str] | None = None) -> int:
    """Make what is missing."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _options(given)
    sheet = Sheet(options.out, table)
    if options.starts:
        return _of_starts(sheet, options, given)
    budget = {"tokens": options.tokens} if options.tokens else {"minutes": f"{options.minutes:g}"}
    sheet.about("leaderboard.py", given, {"model": options.model, **budget, "jobs": options.jobs})
    try:
        wanted = [one for one in conversions(options) if "student" not in sheet.rows.get(one.name, {})]
    except LinearizeError as error:
        print(error, file=sys.stderr)
        return 2
    for name, row in made(wanted, options.jobs, stop_after=options.stop_after):
        sheet.rows[name] = row
        sheet.write()
        print(f"{name:24} {row.get('failed') or f'{ratio(row):.3f} x the perplexity'}", flush=True)
    return _show(sheet)


def _show(sheet: Sheet) -> int:
    sheet.write()
    picture(sheet.rows, sheet.path.with_suffix(".png"), sheet.found.get("unjudged", {}))
    print(sheet.table(sheet.found))
    return int(bool(failures(sheet.rows)))


def _of_starts(sheet: Sheet, options: argparse.Namespace, given: list[str]) -> int:
    """Rows that `starts.py --judge` trained and judged, with how fast each trains and decodes on the card."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in options.starts]
    settings = found[0]["settings"]
    if any({**one["settings"], "source": 0} != {**settings, "source": 0} for one in found):
        print("--starts: these were made with other settings", file=sys.stderr)
        return 2
    tokens = f"{int(settings['train']) / 1e6:g}M"
    sheet.about("leaderboard.py", given, {"model": settings["model"], "tokens": tokens})
    runs = [run for one in found for run in one.get("runs", [one])]
    made = {"decoding": speeds("decode", 64, 8192), "training_speed": speeds("train", 64, 1024)}
    sheet.found["rows"] = starts_rows([one["rows"] for one in found], made)
    sheet.found["unjudged"] = trained_alone(
        [one["rows"] for one in found], found[-1].get("teacher", {}), sheet.rows
    )
    shown = [*sheet.rows.values(), *sheet.found["unjudged"].values()]
    commits = {row.get("commit", run["commit"]) for row in shown for run in runs}
    sheet.found["runs"] = [
        {key: run[key] for key in ("command", "date", "commit")} for run in runs if run["commit"] in commits
    ]
    if not ranked(sheet.rows):
        print(
            "--starts: nothing in there was judged; starts.py --train TOKENS --judge SUITE does",
            file=sys.stderr,
        )
        return 2
    return _show(sheet)


def starts_rows(sheets: list[dict[str, Row]], speed: dict[str, dict[str, float]]) -> dict[str, Row]:
    """Rows of `starts.py` as rows of the leaderboard; the untrained window's beside each.

    Args:
        sheets: rows by recipe, a newer sheet's in the place of an older one's.
        speed: what of -> recipe -> tokens/s.
    """
    rows: dict[str, Row] = {}
    for sheet in sheets:  # where the newest row was not judged, an older one that was has its place
        for name, row in sorted(sheet.items(), key=lambda pair: " @" not in pair[0]):
            if row.get("judged"):
                rows[name.split(" @")[0]] = row
    window = rows.get("swa_sinks", {}).get("judged", {}).get("student", {})
    made = {}
    for name, row in rows.items():
        if name == "softmax":
            continue  # the teacher, in this package's machinery
        made[name] = dict(row["judged"])
        if "training" in made[name]:  # beside other runs, so its seconds are nobody's
            made[name]["training"] = {key: x for key, x in made[name]["training"].items() if key != "seconds"}
        made[name] |= {"swa_sinks": window} if window and "student" in made[name] else {}
        made[name] |= {key: row[key] for key in ("commit", "note") if key in row}
        made[name] |= {what: found[name] for what, found in speed.items() if name in found}
    return made


def trained_alone(
    sheets: list[dict[str, Row]], teacher: dict[str, float], judged: Collection[str]
) -> dict[str, Row]:
    """Rows that were trained and not judged, with the perplexities that the runs measured themselves.

    Args:
        sheets: rows by recipe, a newer sheet's in the place of an older one's.
        teacher: its perplexities on the same windows.
        judged: recipes that need none.
    """
    rows = {name: row for sheet in sheets for name, row in sheet.items() if row.get("after")}
    return {
        name: {
            **{key: row[key] for key in ("commit", "note") if key in row},
            "student": {f"ppl {text}": value for text, value in row["after"].items()},
            "teacher": {f"ppl {text}": value for text, value in teacher.items()},
        }
        for name, row in rows.items()
        if name not in judged and " @" not in name
    }


def speeds(
    measured: str, batch: int, length: int, path: Path = ROOT / "docs" / "results" / "recipes-h200.json"
) -> dict[str, float]:
    """Recipe -> tokens/s of so many texts, in the quickest of the ways that were measured alone on a card."""
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    found: dict[str, float] = {}
    for row in rows:
        alone = not row.get("note")  # else beside other work on the card
        if alone and (row["measured"], row["batch"], row["length"]) == (measured, batch, length):
            found[row["recipe"]] = max(found.get(row["recipe"], 0.0), row["tokens_per_second"] or 0.0)
    return {recipe: speed for recipe, speed in found.items() if speed}


def conversions(options: argparse.Namespace) -> list[Conversion]:
    """One for each recipe, all composed before the first begins.

    Raises:
        LinearizeError: a recipe or an override that is none.
    """
    names = options.recipes or [name for name, _ in list_recipes() if name not in LEFT_OUT]
    budget = f"{options.tokens}-tokens" if options.tokens else f"{options.minutes:g}m"
    try:
        parse(budget)
    except ValueError as error:
        raise LinearizeError(f"--{'tokens' if options.tokens else 'minutes'} {error}") from error
    found = []
    for name in names:
        overrides = ["eval.ablations=false", "eval.max_windows=16", *options.overrides]
        trains = compose(name, overrides).stages
        found.append(
            Conversion(
                name=Path(name).stem if is_file_name(name) else name,
                model=options.model,
                recipe=name,
                overrides=overrides,
                budget=budget if trains else "",
                runs=options.runs,
                judging=judging(options),
            )
        )
    return found


def judging(options: argparse.Namespace) -> list[str]:
    """Options of `linearize eval`."""
    found = ["--suite", str(options.suite)]
    for text in options.text:
        found += ["--text", text]
    if options.task_data:
        found += [
            "--tasks",
            options.tasks,
            "--task-data",
            str(options.task_data),
            "--limit",
            str(options.limit),
        ]
    return found


def table(found: dict[str, Any]) -> str:
    """The page."""
    rows = found["rows"]
    shown = [*controls(rows).items(), *ranked(rows)]
    cells = {name: columns(row) for name, row in shown}
    spans = {name: intervals(row) for name, row in shown}
    heads = titles(list(cells.values()))
    lines = [
        [name, *(number(row.get(title)) + spans[name].get(title, "") for title in heads)]
        for name, row in cells.items()
    ]
    devices = {row["training"]["device"] for _, row in ranked(rows) if "training" in row}
    made = found.get("runs", [])
    how = [
        f"`{run['command']}`, {run['date']}, commit {run['commit']}"
        for run in [*made, found]
        if "command" in run
    ]
    head = [
        f"# {_title(found)}",
        "",
        f"{'; '.join(how)}. {', '.join(sorted(map(str, devices))) or 'Nothing measured yet'}.",
        "",
        *_says(found),
        "",
    ]
    failed = failures(rows)
    tail = _unjudged(found.get("unjudged", {})) + (["", "Failed:", "", *failed, ""] if failed else [])
    for name, row in {**rows, **found.get("unjudged", {})}.items():
        tail += ["", f"{name}: {row['note']}", ""] if "note" in row else []
    return "\n".join([*head, ""]) + markdown(["recipe", *heads], lines) + "\n".join(tail)


def _title(found: dict[str, Any]) -> str:
    settings = found.get("settings", {})
    much = f"{settings['tokens']} tokens" if "tokens" in settings else f"{settings.get('minutes')} minutes"
    return f"Every recipe after {much} of training: {settings.get('model')}"


def _says(found: dict[str, Any]) -> list[str]:
    """What is alike in all rows, and what is not."""
    settings = found.get("settings", {})
    order = (
        "Sorted by the geometric mean of the texts' perplexities over the teacher's; the text `demo` is the package's "
        "own sample."
    )
    if "runs" in found:
        return [
            "All rows have the same tokens, not the same minutes: the runs shared cards, so their seconds say "
            "nothing of a recipe. Each trains at its published rates, in the proportions of its stages and 8 "
            "sequences a step, and begins at its calibrated start; a line with `KEY=VALUE` has that instead. "
            f"{order} Brackets are 95 % intervals. Speeds are of recipes-h200.json: decoding was measured alone; "
            "forward and backward of the whole model, without a teacher, beside processes that compiled, so they are "
            "lower bounds. MiB are the decode engine's states and caches of one text.",
            *_which(found["rows"], found.get("unjudged", {})),
        ]
    if "tokens" in settings:
        return [
            "All rows have the same tokens, not the same minutes. Published rates and batches are scaled by `--budget` "
            f"(docs/training.md). {order}"
        ]
    return [
        f"{settings.get('jobs')} at once, one a GPU where there are several. Published rates and batches are scaled by "
        f"`--budget` (docs/training.md); evaluation, calibration and writing of text are not in the minutes. {order}"
    ]


def _which(rows: dict[str, Row], unjudged: dict[str, Row]) -> list[str]:
    """The commit of each row, where several made them, and recipes that have none yet."""
    of: dict[str, list[str]] = {}
    for name, row in rows.items():
        of.setdefault(row.get("commit", ""), []).append(f"`{name}`")
    commits = [f"Of commit {commit}: {', '.join(names)}." for commit, names in of.items() if commit]
    shipped = [name for name, _ in list_recipes() if name != "softmax"]
    missing = [f"`{name}`" for name in shipped if name not in rows and name not in unjudged]
    said = [f"In neither table, {len(missing)} of {len(shipped)}: {', '.join(missing)}."] if missing else []
    return [paragraph for line in [*commits, *said] for paragraph in ("", line)]


def _unjudged(rows: dict[str, Row]) -> list[str]:
    """The second table: of runs that ended and were not judged."""
    if not rows:
        return []
    texts = list(dict.fromkeys(key for row in rows.values() for key in row["student"]))
    lines = []
    for name, row in ranked(rows):
        pairs = [(row["student"].get(key), row["teacher"].get(key)) for key in texts]
        cells = [
            [number(value), number(value / beside if value and beside else None)] for value, beside in pairs
        ]
        lines.append([name, *(cell for pair in cells for cell in pair), row.get("commit", "")])
    heads = [title for key in texts for title in (key, f"x teacher's, {key[4:]}")]
    return [
        "",
        "Trained likewise, not judged: perplexities of students and teacher are the runs' own, on more windows than "
        "the judge's.",
        "",
        markdown(["recipe", *heads, "commit"], lines),
    ]


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="onto every recipe, such as data")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--recipes", type=_names, default=[], metavar="A,B", help="names or files; all by default"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, each")
    parser.add_argument(
        "--tokens", default="", metavar="N", help="of training, each, in the place of minutes; 1M"
    )
    parser.add_argument(
        "--starts",
        type=Path,
        nargs="*",
        default=[],
        metavar="FILE",
        help="rows of `starts.py --judge`; runs nothing",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="at once: alone on a GPU for numbers that are alike"
    )
    parser.add_argument("--suite", default=ROOT / "scripts" / "leaderboard_suite.yaml", help="of the judge")
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="repeatable; the package's by default",
    )

    parser.add_argument("--tasks", default="all", metavar="A,B", help="with --task-data")
    parser.add_argument("--task-data", type=Path, metavar="DIR", help="of the five local tasks")
    parser.add_argument("--limit", type=int, default=0, help="items of a task; 0: all")
    parser.add_argument(
        "--stop-after", type=float, default=float("inf"), metavar="SECONDS", help="begin nothing new"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/leaderboard"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "leaderboard.json")
    return parser.parse_intermixed_args(arguments)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


if __name__ == "__main__":
    raise SystemExit(main())
