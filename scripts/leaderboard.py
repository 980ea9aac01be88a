"""Every shipped recipe at the same minutes of training on the same card, judged alike: rows as they come, resumable.

    python scripts/leaderboard.py --minutes 10 --text wikitext2=wikitext2.test.parquet
    python scripts/leaderboard.py --recipes best_constant,lolcats --minutes 1 --jobs 8    # one recipe a GPU

Writes leaderboard.json, .md and .png in docs/results (`--out`); what is there is not made again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from conversions import Conversion, columns, controls, failures, made, ranked, ratio, titles
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
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
    sheet.about(
        "leaderboard.py", given, {"model": options.model, "minutes": options.minutes, "jobs": options.jobs}
    )
    try:
        wanted = [one for one in conversions(options) if "student" not in sheet.rows.get(one.name, {})]
    except LinearizeError as error:
        print(error, file=sys.stderr)
        return 2
    for name, row in made(wanted, options.jobs, stop_after=options.stop_after):
        sheet.rows[name] = row
        sheet.write()
        print(f"{name:24} {row.get('failed') or f'{ratio(row):.3f} x the perplexity'}", flush=True)
    sheet.write()
    picture(sheet.rows, options.out.with_suffix(".png"))
    print(sheet.table(sheet.found))
    return int(bool(failures(sheet.rows)))


def conversions(options: argparse.Namespace) -> list[Conversion]:
    """One for each recipe, all composed before the first begins.

    Raises:
        LinearizeError: a recipe or an override that is none.
    """
    names = options.recipes or [name for name, _ in list_recipes() if name not in LEFT_OUT]
    budget = f"{options.minutes:g}m"
    try:
        parse(budget)
    except ValueError as error:
        raise LinearizeError(f"--minutes {error}") from error
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
    heads = titles(list(cells.values()))
    lines = [[name, *(number(row.get(title)) for title in heads)] for name, row in cells.items()]
    settings = found.get("settings", {})
    devices = {row["training"]["device"] for _, row in ranked(rows)}
    head = [
        f"# Every recipe at {settings.get('minutes')} minutes of training: {settings.get('model')}",
        "",
        f"`{found.get('command')}`, {found.get('date')}, commit {found.get('commit')}, "
        f"{', '.join(sorted(map(str, devices))) or 'nothing measured yet'}, {settings.get('jobs')} at once, one a GPU "
        "where there are several.",
        "",
        "Published rates and batches are scaled by `--budget` (docs/training.md); evaluation, calibration and "
        "writing of text are not in the minutes. Sorted by the mean ratio of perplexities to the teacher's.",
        "",
    ]
    failed = failures(rows)
    tail = ["", "Failed:", "", *failed, ""] if failed else []
    return "\n".join([*head, ""]) + markdown(["recipe", *heads], lines) + "\n".join(tail)


def picture(rows: dict[str, Any], path: Path) -> None:
    """Ratio of perplexities of every recipe as bars, and the untrained window as a line."""
    shown = ranked(rows)
    if not shown:
        return
    figure = Figure(figsize=(8, 1.2 + 0.26 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names, values = [name for name, _ in shown][::-1], [ratio(row) for _, row in shown][::-1]
    best = ["#D55E00" if name.startswith("best_") else "#0072B2" for name in names]
    axes.barh(names, values, color=best)
    for place, value in enumerate(values):
        axes.text(value, place, f" {value:.2f}" if value < 100 else f" {value:.0f}", va="center", fontsize=8)
    window = controls(rows).get("**swa_sinks, untrained**")
    if window:
        axes.axvline(
            ratio(window), color="#000000", linestyle="--", linewidth=1, label="swa_sinks, untrained"
        )
        axes.legend(loc="lower right", frameon=False)
    axes.set_xscale("log")
    axes.set_xlabel("perplexity over the teacher's (mean over texts; 1 is the teacher)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=8)
    figure.savefig(path, dpi=120)


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
