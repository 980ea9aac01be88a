"""Short conversions that differ in one thing each, at equal tokens: rows as they come, resumable, with a table.

    python scripts/ablate.py scripts/ablations.yaml --jobs 8                 # one variant a GPU
    python scripts/ablate.py scripts/ablations.yaml --only base,kda --budget 4M-tokens

The file names a recipe, a budget, overrides for all, and variants: a name and the overrides that make it. A variant may
name another recipe: `{recipe: NAME, overrides: [...]}`. Writes a JSON file and its table (`--out`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from conversions import Conversion, columns, controls, failures, made, ranked, ratio, titles
from sheet import ROOT, Sheet, markdown, names, number, plan_of

from linearize.config import compose
from linearize.config.budget import check, parse
from linearize.errors import LinearizeError
from linearize.registry import closest

KEYS = ("about", "model", "recipe", "budget", "overrides", "texts", "suite", "variants")
BASE = "base"
"""The variant that differs in nothing, which others are compared with."""


def main(arguments: list[str] | None = None) -> int:
    """Make what is missing."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _options(given)
    try:
        plan = read(options.plan)
        wanted = conversions(plan, options)
    except LinearizeError as error:
        print(error, file=sys.stderr)
        return 2
    out = options.out or ROOT / "docs" / "results" / f"{options.plan.stem}.json"
    sheet = Sheet(out, table)
    budget = options.budget or plan["budget"]
    if sheet.rows and sheet.found.get("settings", {}).get("budget") != budget:
        print(f"{out} holds rows of another budget than {budget}; give another --out", file=sys.stderr)
        return 2
    sheet.about("ablate.py", given, {"budget": budget, "model": wanted[0].model, "recipe": plan["recipe"]})
    sheet.found["about"] = plan.get("about", "")
    sheet.found["variants"] = {name: changes for name, (_, changes) in variants(plan).items()}
    todo = [one for one in wanted if "student" not in sheet.rows.get(one.name, {})]
    for name, row in made(todo, options.jobs, stop_after=options.stop_after):
        sheet.rows[name] = row
        sheet.write()
        print(f"{name:32} {row.get('failed') or f'{ratio(row):.3f} x the perplexity'}", flush=True)
    sheet.write()
    print(table(sheet.found))
    return int(bool(failures(sheet.rows)))


def read(path: Path) -> dict[str, Any]:
    """A plan; see `sheet.plan`."""
    return plan_of(path, KEYS, needed=("recipe", "budget"))


def variants(plan: dict[str, Any]) -> dict[str, tuple[str, list[str]]]:
    """Name -> recipe and overrides of its own."""
    found = {}
    for name, value in plan["variants"].items():
        value = {"overrides": value or []} if not isinstance(value, dict) else value
        found[name] = (value.get("recipe", plan["recipe"]), list(value.get("overrides", [])))
    return found


def conversions(plan: dict[str, Any], options: argparse.Namespace) -> list[Conversion]:
    """One for each variant, all composed before the first begins.

    Raises:
        LinearizeError: a variant that cannot be, or is not there.
    """
    known, found = variants(plan), []
    for name in options.only:
        if name not in known:
            raise LinearizeError(f"--only: no variant '{name}'; {closest(name, known)}")
    try:
        budget = parse(options.budget or plan["budget"])
    except ValueError as error:
        raise LinearizeError(f"budget: {error}") from error
    judging = ["--suite", str(options.suite or ROOT / plan.get("suite", "scripts/ablations_suite.yaml"))]
    for text in options.text or plan.get("texts", []):
        judging += ["--text", text]
    for name in options.only or known:
        recipe, own = known[name]
        overrides = ["eval.ablations=false", "eval.max_windows=16", *plan.get("overrides", []), *own]
        overrides += options.overrides
        try:
            check(compose(recipe, overrides), budget)
        except LinearizeError as error:
            raise LinearizeError(f"variant '{name}': {error}") from error
        model = options.model or plan.get("model", "smollm2-135m")
        found.append(Conversion(name, model, recipe, overrides, budget.text, options.runs, judging))
    return found


def table(found: dict[str, Any]) -> str:
    """The page: the best variant first, each against the base."""
    rows, settings = found["rows"], found.get("settings", {})
    shown = [*controls(rows).items(), *ranked(rows)]
    cells = {name: columns(row) for name, row in shown}
    heads = titles(list(cells.values()))
    base = ratio(rows[BASE]) if "student" in rows.get(BASE, {}) else None
    lines = []
    for name, row in shown:
        against = "" if base is None else f"{100 * (ratio(row) / base - 1):+.1f}"
        changed = " ".join(f"`{change}`" for change in found.get("variants", {}).get(name, []))
        lines.append([name, against, *(number(cells[name].get(title)) for title in heads), changed])
    head = [
        f"# Ablations of {settings.get('recipe')}: {settings.get('model')}",
        "",
        f"`{found.get('command')}`, {found.get('date')}, commit {found.get('commit')}. {found.get('about', '')}",
        "",
        f"Each {settings.get('budget')} in all stages, scaled by `--budget` (docs/training.md). Against base: the mean "
        "ratio of perplexities, in percent, less is better.",
        "",
    ]
    failed = failures(rows)
    tail = ["", "Failed:", "", *failed, ""] if failed else []
    titled = ["variant", "against base, %", *heads, "what differs"]
    return "\n".join([*head, ""]) + markdown(titled, lines) + "\n".join(tail)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path, metavar="PLAN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="onto every variant")
    parser.add_argument("--model", default="", help="in place of the plan's")
    parser.add_argument("--budget", default="", help="in place of the plan's")
    parser.add_argument("--suite", type=Path, help="of the judge, in place of the plan's")
    parser.add_argument(
        "--text", action="append", default=[], metavar="NAME=FILE", help="in place of the plan's"
    )
    parser.add_argument("--only", type=names, default=[])
    parser.add_argument(
        "--jobs", type=int, default=1, help="at once; each has a GPU to itself where there are several"
    )
    parser.add_argument(
        "--stop-after", type=float, default=float("inf"), metavar="SECONDS", help="begin nothing new"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--out", type=Path, help="JSON; docs/results/PLAN.json by default")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
