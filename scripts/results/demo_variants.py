"""Ways to spend the demo's minutes: variants of a recipe, each measured on the demo's held-out windows.

    python scripts/results/demo_variants.py scripts/results/demo_variants.yaml --only 'windows alone'
    python scripts/results/demo_variants.py scripts/results/demo_variants.yaml --finished "the demo=runs/demo"

A row is written as soon as it is there, and a call that is repeated goes on; several calls may run beside each other
where each has an `--out` of its own. What differs in stages alone is calibrated once. Seconds are the process's own, of
one thread, so that other work beside counts less.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import set_seed

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from sheet import Sheet, markdown, number  # noqa: E402

import linearize  # noqa: E402
from linearize import data, surgery  # noqa: E402
from linearize.config import compose  # noqa: E402
from linearize.config.schema import Recipe  # noqa: E402
from linearize.distill import calibrate, stages, teachers, texts  # noqa: E402
from linearize.distill.folder import RunFolder  # noqa: E402
from linearize.distill.placing import Place  # noqa: E402
from linearize.distill.results import Measurer  # noqa: E402
from linearize.distill.stages import StagePlace  # noqa: E402
from linearize.errors import LinearizeError  # noqa: E402

COLUMNS = {
    "ppl": "ppl",
    "off": "ppl, linear off",
    "kl": "KL",
    "kl_off": "KL, linear off",
    "same": "same token, %",
}


class Measured:
    """A teacher's distributions over the windows that the demo is measured on, and a model beside them.

    Args:
        teacher: the model before it is converted.
        windows: [N, T] token ids.
    """

    def __init__(self, teacher: nn.Module, windows: Tensor) -> None:
        self.windows = windows
        self.teacher = [predicted(teacher, window) for window in windows]

    def of(self, model: nn.Module) -> dict[str, float]:
        """Perplexity, KL in nats a token, % of tokens with the teacher's likeliest; the first two with linear off."""
        found = self._one(model)
        if any(layer.mixer.has_both_branches for layer in surgery.converted(model)):
            with surgery.branch_off(model, "linear"):
                off = self._one(model)
            found |= {"off": off["ppl"], "kl_off": off["kl"]}
        return found

    def _one(self, model: nn.Module) -> dict[str, float]:
        losses, away, same = [], [], []
        for window, teacher in zip(self.windows, self.teacher, strict=True):
            student = predicted(model, window)
            losses.append(-student[:-1].gather(1, window[1:, None])[:, 0])
            away.append((teacher.exp() * (teacher - student)).sum(-1)[:-1])
            same.append((student.argmax(-1) == teacher.argmax(-1))[:-1].float())
        return {
            "ppl": math.exp(torch.cat(losses).mean()),
            "kl": float(torch.cat(away).mean()),
            "same": 100 * float(torch.cat(same).mean()),
        }


@torch.no_grad()
def predicted(model: nn.Module, window: Tensor) -> Tensor:
    """Log probabilities [T, V] behind each token of a window [T]."""
    return model(input_ids=window[None]).logits[0].float().log_softmax(-1)


def variant(source: str, recipe: Recipe, measured: Measured, tokenizer: Any, runs: Path) -> dict[str, Any]:
    """A row: what the start and every stage come to, and the seconds of this process that they took."""
    place = Place(source, recipe, torch.device("cpu"), torch.float32, None)
    model, _ = place.load()
    set_seed(recipe.run.seed)
    model = surgery.convert(model, recipe.mixer, recipe.layers, recipe.mixers).eval()
    rows: list[dict[str, Any]] = []
    start = _start(recipe)
    if calibrate.wanted(recipe, model):
        folder, seconds = runs / start, None
        if not calibrate.is_done(folder):
            began = time.process_time()
            calibrate.write(
                model, folder, calibrate.calibrate(model, calibrate.text(recipe, tokenizer), autocast=None)
            )
            seconds = time.process_time() - began
        calibrate.restore(model, folder)
        rows.append({"after": "calibrated", "tokens": recipe.calibrate.tokens, "seconds": seconds})
    else:
        rows.append({"after": "swapped", "tokens": 0, "seconds": 0.0})
    rows[-1] |= measured.of(model)
    for index, (name, stage) in enumerate(recipe.stages.items(), start=1):
        with tempfile.TemporaryDirectory(dir=runs) as scratch:
            at = _place(recipe, index, Path(scratch) / name)
            text = texts.dataset(recipe, recipe, tokenizer, at)
            began = time.process_time()
            model = stages.train(
                model,
                stage,
                at,
                run=recipe.run,
                dataset=text,
                length=recipe.data.of(stage).length,
                autocast=None,
                teacher=place.original if teachers.apart(recipe, name) else None,
            )
            seconds = time.process_time() - began
        rows.append({"after": name, "tokens": stage.tokens, "seconds": seconds} | measured.of(model))
        print(json.dumps(rows[-1]), flush=True)
    return {"stages": rows}


def finished(source: str, folder: Path) -> Any:
    """The model of a run that has ended, or whose stages have."""
    if (folder / "checkpoint").is_dir():
        return linearize.load(folder / "checkpoint", dtype=torch.float32)
    recipe, kept = compose(str(folder / "recipe.yaml"), []), RunFolder(folder)
    model, _ = Place(source, recipe, torch.device("cpu"), torch.float32, None).load()
    model = surgery.convert(model, recipe.mixer, recipe.layers, recipe.mixers).eval()
    if calibrate.is_done(kept.stage(0, calibrate.NAME)):
        calibrate.restore(model, kept.stage(0, calibrate.NAME))
    for index, name in enumerate(recipe.stages, start=1):
        at = _place(recipe, index, kept.stage(index, name))
        model = stages.restore(model, recipe.stages[name], at)
    return model.eval()


def _place(recipe: Recipe, index: int, folder: Path) -> StagePlace:
    return StagePlace(
        index=index,
        count=len(recipe.stages),
        name=list(recipe.stages)[index - 1],
        folder=folder,
        metrics=folder.with_suffix(".jsonl"),
        resume_command="none: a variant begins again",
        less_memory=lambda: "",
    )


def lines(plan: dict[str, Any], one: Any) -> tuple[str, list[str]]:
    """Recipe and overrides of a variant."""
    if isinstance(one, dict):
        return one["recipe"], [*plan["overrides"], *one.get("overrides", [])]
    return plan["recipe"], [*plan["overrides"], *plan["small"], *one]


def _start(recipe: Recipe) -> str:
    """A name for what a calibration depends on."""
    parts = [recipe.mixer, recipe.mixers, recipe.layers, recipe.calibrate, recipe.data, recipe.run.seed]
    return "start-" + hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def table(found: dict[str, Any]) -> str:
    """One line for each stage of each variant, in the order in which they were asked for."""
    lines = []
    for name, row in found["rows"].items():
        for stage in row["stages"]:
            digits = {"kl": 4, "kl_off": 4, "same": 0}
            cells = [number(stage.get(key), digits.get(key, 2)) for key in COLUMNS]
            spent = [f"{stage['tokens']:,}" if stage["tokens"] else "", number(stage["seconds"], 0)]
            lines.append([f"{name}: {stage['after']}", *cells, *spent])
    titles = ["variant: after", *COLUMNS.values(), "tokens", "seconds"]
    changes = [f"- {name}: {said}" for name, said in found.get("variants", {}).items()]
    about = f"`{found.get('command')}`, {found.get('date')}, commit {found.get('commit')}."
    title = "# What the demo's minutes can make"
    return "\n".join([title, "", about, "", markdown(titles, lines), *changes]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the rows that are missing."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path)
    parser.add_argument("--only", action="append", default=[], metavar="NAME")
    parser.add_argument("--finished", action="append", default=[], metavar="NAME=RUN", help="runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/demo-variants"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "demo-variants.json")
    options = parser.parse_args(given)
    plan = yaml.safe_load(options.plan.read_text(encoding="utf-8"))
    sheet = Sheet(options.out, table)
    try:
        said = {name: lines(plan, one) for name, one in plan["variants"].items()}
        recipes = {
            name: compose(recipe, overrides)
            for name, (recipe, overrides) in said.items()
            if name in options.only or not (options.only or options.finished)
        }
    except LinearizeError as error:
        print(error, file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    options.runs.mkdir(parents=True, exist_ok=True)
    sheet.about("results/demo_variants.py", given, {"model": plan["model"]})
    sheet.found["variants"] = {name: shlex.join([recipe, *own]) for name, (recipe, own) in said.items()}
    demo = compose("demo", [])
    model, tokenizer = Place(plan["model"], demo, torch.device("cpu"), torch.float32, None).load()
    measured = Measured(model, Measurer(demo, tokenizer).texts[data.HELD_OUT])
    own = {"after": "teacher", "tokens": 0, "seconds": 0.0}
    sheet.rows.setdefault("teacher", {"stages": [own | measured._one(model)]})
    del model
    for named in options.finished:
        name, _, folder = named.partition("=")
        converted = finished(plan["model"], Path(folder))
        kept = {"after": "a whole run", "tokens": 0, "seconds": 0.0}
        sheet.rows[name] = {"stages": [kept | measured.of(converted)]}
        sheet.write()
    for name, recipe in recipes.items():
        if name not in sheet.rows:
            sheet.rows[name] = variant(plan["model"], recipe, measured, tokenizer, options.runs)
            sheet.write()
    sheet.write()
    print(table(sheet.found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
