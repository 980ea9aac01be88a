"""Where every recipe starts: perplexity of the swapped and of the calibrated model, and after some training with both.

Writes a JSON file row by row, and a table of it beside; what is in the file is not measured again.

    python scripts/starts.py --out docs/results/starts.json
    python scripts/starts.py --out docs/results/starts-h100.json --train 1M --windows 16 --length 1024 --jobs 8

With `--calibrated-only --judge SUITE` each trained model is judged as well, before it goes: rows of the leaderboard.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import queue
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from judging import Judgement, add_options, state_bytes
from sheet import ROOT, Sheet
from starts_runs import folder_of, results_of, starts_of
from starts_table import MEASURED, PUBLISHED, join, table
from transformers import set_seed

from linearize import data, distill, models, surgery
from linearize.config import compose, list_recipes
from linearize.config.schema import DataConfig, EvalConfig, Recipe
from linearize.config.values import as_number
from linearize.distill import calibrate, exporting
from linearize.distill.device import resolve_device, resolve_precision, resolve_weights
from linearize.errors import LinearizeError
from linearize.eval.perplexity import perplexity, windows

TOO_LONG = 124
"""Of a recipe that was ended or not begun, see `--most` and `--whole`; as `timeout` has it."""
LEAST = 40
"""Seconds in which a recipe has something to show."""
STEP = 8
"""Sequences of a step in `--train`: the published batches are larger than a million tokens."""


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing."""
    options = _options(arguments)
    sheet = Sheet(options.out, table)
    found = sheet.found
    if options.join:
        join(found, [json.loads(path.read_text()) for path in options.join])
        sheet.write()
        return 0
    sheet.about(
        "starts.py",
        list(arguments or sys.argv[1:]),
        {
            name: getattr(options, name)
            for name in ("model", "tokens", "length", "windows", "train", "texts", "source")
        },
    )
    names = options.recipes or [name for name, _ in list_recipes()]
    for name in names:
        _composed(name)  # a misspelt one is refused before anything runs
    if options.jobs > 1:
        return _side_by_side(sheet, names, options, list(arguments or sys.argv[1:]))
    measured = _Start(options)
    found.setdefault("teacher", {})
    for name in names:
        row = found["rows"].setdefault(name, {})
        if options.published_only:
            if _composed(name).stages and PUBLISHED not in row:
                row[PUBLISHED] = measured.trained(name, on=False)
                found["teacher"] |= results_of(folder_of(options, name, on=False))["teacher"]
                sheet.write()
            print(f"{name:18} {json.dumps(row.get(PUBLISHED))}", flush=True)
            continue
        if options.train and options.calibrated_only and _composed(name).stages:
            if not _whole(row, options):
                try:
                    found["teacher"] |= measured.whole(name, row, sheet.write)
                finally:
                    sheet.write()
            print(f"{name:18} {json.dumps({key: row[key] for key in row if key != 'layers'})}", flush=True)
            continue
        if not found["teacher"]:
            found["teacher"] = measured.teacher()
        if "swapped" not in row:
            row |= measured.swapped(name)
            sheet.write()
        if "calibrated" not in row:
            row |= {"calibrated": None, **measured.calibrated(name)}
            sheet.write()
        for key, on in (("after", True), (PUBLISHED, False)):
            if (
                options.train
                and (on or not options.calibrated_only)
                and key not in row
                and _composed(name).stages
                and (on or row["calibrated"])
            ):
                row[key] = measured.trained(name, on=on)
                sheet.write()
        if options.judge and "judged" not in row and not _composed(name).stages:
            row["judged"] = measured.judged(name)
            sheet.write()
        print(f"{name:18} {json.dumps({key: row[key] for key in row if key != 'layers'})}", flush=True)
    return 0


def _side_by_side(sheet: Sheet, names: list[str], options: argparse.Namespace, arguments: list[str]) -> int:
    """Every recipe in a process of its own with a file of its own, put together as they end; jobs share the cards."""
    found, path = sheet.found, sheet.path
    parts = path.parent / f"{path.stem}-parts"
    parts.mkdir(parents=True, exist_ok=True)
    cards = torch.cuda.device_count() if options.device != "cpu" else 0
    free: queue.Queue[int] = queue.Queue()
    for job in range(options.jobs):
        free.put(job % max(1, cards))

    began = time.monotonic()

    def one(name: str) -> tuple[str, int]:
        part = parts / f"{name.replace(' ', '+')}.json"
        own = [*arguments, "--jobs", "1", "--recipes", name, "--out", str(part)]
        if options.whole and began + options.whole - time.monotonic() < LEAST:
            return name, TOO_LONG
        card = free.get()
        given = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        given |= {"CUDA_VISIBLE_DEVICES": str(card)} if cards > 1 else {}
        try:
            with part.with_suffix(".log").open("w") as log:
                return name, subprocess.run(
                    [sys.executable, __file__, *own],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=given,
                    timeout=min(options.most or 1e9, began + (options.whole or 1e9) - time.monotonic()),
                ).returncode
        except subprocess.TimeoutExpired:
            return name, TOO_LONG
        finally:
            free.put(card)

    failed = []
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = [name for name in names if not _whole(found["rows"].get(name, {}), options)]
        for done in as_completed([pool.submit(one, name) for name in waiting]):
            name, code = done.result()
            part = parts / f"{name.replace(' ', '+')}.json"
            made = json.loads(part.read_text()) if part.exists() else {"rows": {}}
            found["teacher"] = made.get("teacher") or found.get("teacher", {})
            if code and options.train and options.calibrated_only:  # what it had measured before it ended
                made["rows"][name] = made["rows"].get(name, {}) | starts_of(folder_of(options, name, on=True))
            said = {key: row for key, row in made["rows"].items() if row}
            found["rows"] |= said
            failed += [name] if code else []
            sheet.write()
            short = {key: row for key, row in made["rows"].get(name, {}).items() if key in MEASURED}
            print(f"{name:22} {code or ''} {json.dumps(short)}", flush=True)
    if failed:
        print(f"failed, see {parts}: {', '.join(failed)}")
    return int(bool(failed))


class _Start:
    """The model, the texts and the ways to measure a recipe on them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        run = compose("lolcats", [f"run.device={options.device}"]).run
        self.run, self.device = run, resolve_device(run)
        self.autocast = resolve_precision(run, self.device)
        self.sources = {"demo": "builtin"} | dict(text.split("=", 1) for text in options.texts)

    @cached_property
    def tokenizer(self) -> Any:
        return models.load_tokenizer(models.resolve(self.options.model))

    @cached_property
    def texts(self) -> dict[str, Any]:
        return {
            name: windows(
                self.tokenizer,
                data.validation_documents(DataConfig(validation=source), self.tokenizer),
                window=self.options.length,
                max_windows=self.options.windows,
            )
            for name, source in self.sources.items()
        }

    def _load(self) -> tuple[Any, Any]:
        return models.load_teacher(
            self.options.model,
            dtype=resolve_weights(self.run, self.device),
            device=str(self.device),
            for_text=True,
        )

    def _measure(self, model: Any) -> dict[str, float]:
        batch = 16 if self.device.type == "cuda" else 2
        return {
            name: round(
                perplexity(model, self.tokenizer, cut, batch_size=batch, autocast=self.autocast).value, 2
            )
            for name, cut in self.texts.items()
        }

    def teacher(self) -> dict[str, float]:
        return self._measure(self._load()[0].eval())

    def _recipe(self, name: str) -> Recipe:
        recipe = _composed(name)
        recipe.calibrate.tokens = self.options.tokens
        recipe.data.mix = {}  # one text for all recipes
        if self.options.source:
            recipe.data.source, recipe.data.template = list(self.options.source), "rendered"
        recipe.data.length = self.options.length
        recipe.run.device = self.options.device
        return recipe

    def swapped(self, name: str) -> dict[str, Any]:
        """Without anything, and the state."""
        model = self._converted(self._recipe(name))
        return {"state_bytes": state_bytes(model), "swapped": self._measure(model)}

    def calibrated(self, name: str) -> dict[str, Any]:
        """Without training, and what the calibration took and left; {} where a recipe has nothing to set."""
        recipe = self._recipe(name)
        model = self._converted(recipe)
        if not calibrate.wanted(recipe, model):
            return {}
        began = time.monotonic()
        layers = calibrate.calibrate(model, calibrate.text(recipe, self.tokenizer), autocast=self.autocast)
        seconds = round(time.monotonic() - began, 1)
        errors = [[round(layer["before"], 4), round(layer["after"], 4)] for layer in layers]
        return {"calibrated": self._measure(model), "seconds": seconds, "layers": errors}

    def _converted(self, recipe: Recipe) -> Any:
        set_seed(recipe.run.seed)
        return surgery.convert(self._load()[0], recipe.mixer, recipe.layers, recipe.mixers).eval()

    def trained(self, name: str, *, on: bool) -> dict[str, float]:
        """After `--train` tokens in the proportions of the recipe's stages, at its rates."""
        recipe, out = self._training(name, on=on), folder_of(self.options, name, on=on)
        last = f"after {list(recipe.stages)[-1]}"
        if last not in results_of(out):
            exporting.checkpoint = lambda *given, **also: (
                given[3].checkpoint
            )  # its rows are all that is wanted
            distill.run(self.options.model, recipe, out, resume=out.is_dir(), recipe_name=name)
        return results_of(out)[last]

    def whole(self, name: str, row: dict[str, Any], keep: Callable[[], None]) -> dict[str, float]:
        """All of a row from one run, without its checkpoint; what a run that failed had measured is in the row too.

        Args:
            name, row: of the recipe; the row is filled.
            keep: writes the row down.

        Returns:
            The teacher's perplexities.
        """
        recipe, out = self._training(name, on=True), folder_of(self.options, name, on=True)
        row["state_bytes"] = state_bytes(self._converted(recipe))

        def instead(*given: Any, **also: Any) -> Path:
            """In the place of a run's export: its rows, and its judgement, are all that is wanted."""
            row["after"] = results_of(out)[f"after {list(recipe.stages)[-1]}"]
            keep()
            if self.options.judge:
                row["judged"] = self.judged(name, given[0])
            checkpoint: Path = given[3].checkpoint
            return checkpoint

        exporting.checkpoint = instead
        try:
            distill.run(self.options.model, recipe, out, resume=out.is_dir(), recipe_name=name)
            row["after"] = results_of(out)[f"after {list(recipe.stages)[-1]}"]
        finally:
            row |= starts_of(out)
        return results_of(out)["teacher"]

    def judged(self, name: str, model: Any = None) -> dict[str, Any]:
        """What the judge finds of a model in memory, by default the untrained one, or why it found nothing."""
        out = folder_of(self.options, name, on=True)
        model = self._converted(self._recipe(name)) if model is None else model
        texts = {"" if name == "demo" else name: source for name, source in self.sources.items()}
        dtype = resolve_weights(self.run, self.device)
        tasks = (self.options.task_data, self.options.items)
        how = Judgement(self.options.judge, self.options.model, texts, self.autocast, dtype, *tasks)
        try:
            return how.of(model, self.tokenizer, out, shlex.join(["python", *sys.argv]))
        except (LinearizeError, RuntimeError) as error:
            traceback.print_exc()
            return {"failed": " ".join(str(error).split())[:300]}

    def _training(self, name: str, *, on: bool) -> Recipe:
        recipe = self._recipe(name)
        recipe.calibrate.tokens = self.options.tokens if on else 0
        whole = sum(stage.tokens for stage in recipe.stages.values())
        for key, stage in recipe.stages.items():
            pairs = stage.data is not None and stage.data.template == "preference"
            length = recipe.data.of(stage).length if pairs else self.options.length
            recipe.stages[key] = dataclasses.replace(
                stage,
                data=stage.data if pairs else None,
                batch_size=STEP,
                micro_batch="auto",
                tokens=max(STEP * int(length), stage.tokens * self.options.train // whole),
            )
        texts = {text: source for text, source in self.sources.items() if source != "builtin"}
        recipe.run.compile = "never"  # compiling takes longer than a million tokens do
        recipe.eval = EvalConfig(
            length=self.options.length, max_windows=self.options.windows, texts=texts, ablations=False
        )
        return recipe


def _whole(row: dict[str, Any], options: argparse.Namespace) -> bool:
    if options.published_only:
        return PUBLISHED in row
    return "after" in row and (not options.judge or "judged" in row)


def _composed(name: str) -> Recipe:
    """A row's recipe: its name is that of a shipped one, and behind it what is changed."""
    recipe, *changes = name.split()
    return compose(recipe, changes)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "starts.json")
    parser.add_argument(
        "--join",
        nargs="*",
        default=[],
        type=Path,
        metavar="FILE",
        help="sheets into --out, the oldest first; measures nothing",
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--recipes", nargs="*", default=[], help="all by default; 'NAME KEY=VALUE' changes one"
    )
    parser.add_argument("--tokens", type=int, default=16384, help="of the calibration")
    parser.add_argument("--length", type=int, default=512, help="of sequences and windows")
    parser.add_argument("--windows", type=int, default=4, help="of each text")
    parser.add_argument("--texts", nargs="*", default=[], metavar="NAME=FILE", help="beside the demo's")
    parser.add_argument(
        "--source", nargs="*", default=[], metavar="FILE", help="training text, the demo's by default"
    )
    parser.add_argument("--calibrated-only", action="store_true", help="no training from the published start")
    parser.add_argument(
        "--published-only", action="store_true", help="training from the published start alone"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="recipes at once, a process each, dealt out to the cards"
    )
    parser.add_argument(
        "--most", type=float, default=0, metavar="SECONDS", help="of a recipe with --jobs, then it is ended"
    )
    parser.add_argument("--whole", type=float, default=0, metavar="SECONDS", help="the same of all recipes")
    parser.add_argument("--train", type=lambda text: int(as_number(text) or 0), default=0, help="tokens, 1M")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/starts"), help="folder of the runs of --train"
    )
    add_options(parser)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
