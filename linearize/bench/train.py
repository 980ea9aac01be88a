"""`linearize bench train`: the training step of every stage, as a run makes it, beside the softmax model's own.

What is timed is the trainer of a run on random tokens: data loader, passes, clipping, optimizer, schedule. A stage
trains what its namesake in the recipes does; `all` of the softmax model is the yardstick. Every row is written as it
comes.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from linearize import storing
from linearize.bench import flops, quiet, report, whole
from linearize.bench.recipes import about, device_of, say
from linearize.bench.steps import Clocked
from linearize.bench.subjects import SHAPES, TEACHER, chosen, convert, random_model
from linearize.bench.whole import Budget, Row, Stopped, reported
from linearize.config.schema import LoraConfig, RunConfig, StageConfig
from linearize.console import quiet_libraries
from linearize.distill import stages
from linearize.distill.device import resolve_device, resolve_precision, resolve_weights
from linearize.distill.rates import RandomText
from linearize.errors import LinearizeError
from linearize.eval import tables
from linearize.registry import closest

STAGES: dict[str, dict[str, Any]] = {
    "transfer": {"objective": {"attention_output": 1000.0}, "train": ["mixers"]},
    "weights": {"objective": {"attention_weights": 1.0}, "train": ["mixers"]},
    "matrix": {"objective": {"mixing_matrix": 1.0}, "train": ["mixers"]},
    "lora": {"objective": {"next_token": 1.0}, "train": ["lora"], "lora": LoraConfig()},
    "lora_kl": {"objective": {"logits_kl": 1.0}, "train": ["lora"], "lora": LoraConfig()},
    "all": {"objective": {"next_token": 1.0}, "train": ["all"]},
    "all_kl": {"objective": {"logits_kl": 1.0}, "train": ["all"]},
}
"""Name -> what a stage of it is; the order is that of a run."""
DEFAULT = ("transfer", "lora", "lora_kl", "all_kl")
SIZES = {
    "smollm2-135m": (16, 1024),
    "smollm2-360m": (16, 1024),
    "llama-3.2-1b": (8, 2048),
    "llama-3-8b": (4, 2048),
    "tiny": (2, 32),
}
"""Shape -> batch and length where none are given."""
STEPS = 10_000
"""Of the schedule; a measurement ends long before."""
SHOWN = {
    "recipe": "recipe", "stage": "stage", "batch": "batch", "micro_batch": "at once", "length": "length",
    "tokens_per_second": "tokens/s", "ratio": "times softmax", "mfu": "MFU", "peak_gib": "peak GiB",
    "milliseconds": "ms", "busy": "busy", "bound": "bound by", "note": "note",
}  # fmt: skip
"""Columns of the page."""


def main(options: argparse.Namespace) -> int:
    """Measure, print every row as it comes, and write train.json and train.md.

    Args:
        options: shapes, stages, recipes (names), batch, length (tuples or None), precision, weights, device, kernels
            (auto or torch), checkpointing, only, window_dropout (a rate), no_capture, profile, seconds (of a row's
            repeats), budget (seconds after which nothing new is begun), peak (TFLOP/s of the device, or None), out
            (folder).

    Raises:
        LinearizeError: no such shape, stage or recipe, or no CUDA device.
    """
    for stage in options.stages:
        if stage not in STAGES:
            raise LinearizeError(f"--stages {stage}: no such stage; {closest(stage, STAGES)}")
    names = chosen(options.recipes)
    for shape in options.shapes:
        random_model("meta", torch.float32, shape)
    device = device_of(options.device)
    quiet_libraries()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as a run has it
    page = Page(options, device)
    try:
        with quiet.known(options.out) if options.only else nullcontext():
            for row in rows(names if options.only else [TEACHER, *names], options, device, page.budget):
                page.add(row)
    except Stopped as stop:
        raise LinearizeError(f"{stop}; what was measured is in {page.path}") from stop
    say(f"train.json and train.md in {options.out}")
    return 0


def rows(
    names: list[str], options: argparse.Namespace, device: torch.device, budget: Budget
) -> Iterator[Row]:
    """Every row, shape by shape and the softmax model first."""
    for shape in options.shapes:
        batch, length = SIZES.get(shape, (1, 1024))
        for name in names:
            for stage in ("all",) if name == TEACHER else options.stages:
                for tokens in options.length or (length,):
                    for sequences in options.batch or (batch,):
                        yield measured(name, stage, shape, sequences, tokens, options, device, budget)


def measured(
    name: str,
    stage: str,
    shape: str,
    batch: int,
    length: int,
    options: argparse.Namespace,
    device: torch.device,
    budget: Budget,
) -> Row:
    """One row.

    Args:
        name: of a recipe or composition, or `TEACHER`.
        stage, shape: names.
        batch, length: sequences of a step, and tokens of each.
        options: see `main`.
        device: where.
        budget: of the command.
    """
    row: Row = {"measured": "train", "shape": shape, "recipe": name, "stage": stage, "way": way(options)}
    row |= {"batch": batch, "length": length}
    if budget.spent:
        return row | whole.empty("not run: the budget is spent") | {"mfu": None}
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    why = None if memory is None else too_large(stage, shape, memory)
    if why is not None:
        return row | whole.empty(why) | {"mfu": None}
    found: Row = {}
    with reported() as notes:
        found = step(name, stage, shape, batch, length, options, device)
    whole.release()  # the frames of a failure are gone only now
    budget.leave_out(found)
    return row | (whole.empty(notes[0]) | {"mfu": None} if notes else found)


def too_large(stage: str, shape: str, memory: int) -> str | None:
    """Why a stage that trains all weights cannot fit, whatever the batch; None where it may, or trains less.

    Weights, gradients and AdamW's two moments take 16 bytes a parameter in float32, what products read of the weights 2
    more, and activations at least a twentieth of any device. To find that out by running takes half a minute at 8B, a
    try for each size of a micro-batch.

    Args:
        stage, shape: names.
        memory: of the device, in bytes.
    """
    if "all" not in STAGES[stage]["train"]:
        return None
    needed = 18 * sum(weight.numel() for weight in random_model("meta", torch.float32, shape).parameters())
    if needed <= 0.95 * memory:
        return None
    return (
        f"out of memory: weights, gradients and AdamW take {needed / 2**30:.0f} GiB, "
        f"the device has {memory / 2**30:.0f}"
    )


def way(options: argparse.Namespace) -> str:
    """How it ran, in words: what makes two rows different measurements of one stage."""
    weights = str(resolve_weights(settings(options), torch.device(options.device)))[6:]
    words = [f"{weights} weights", "plain torch" if options.kernels == "torch" else "kernels"]
    words += ["checkpointing"] * options.checkpointing + ["no graph"] * options.no_capture
    return ", ".join(words + [f"windows off at {options.window_dropout:g}"] * bool(options.window_dropout))


def settings(options: argparse.Namespace) -> RunConfig:
    """The `run` section of a recipe."""
    return RunConfig(
        device=options.device,
        precision=options.precision,
        weights=options.weights,
        capture=not options.no_capture,
    )


def step(
    name: str,
    stage: str,
    shape: str,
    batch: int,
    length: int,
    options: argparse.Namespace,
    device: torch.device,
) -> Row:
    """Train until enough has been seen; gives what a row holds.

    Raises:
        LinearizeError: the recipe has nothing that this stage trains, or a loss is no number.
    """
    from linearize.kernels import dispatch

    run = settings(options)
    model = convert(loaded(shape, run), name)
    trained = StageConfig(
        **STAGES[stage],
        tokens=STEPS * batch * length,
        batch_size=batch,
        gradient_checkpointing=options.checkpointing,
        window_dropout=0.0 if name == TEACHER else options.window_dropout,
        log_every=STEPS,
        save_every=2 * STEPS,
    )
    teacher: Callable[[], nn.Module] | None = None
    if "all" in trained.train and name != TEACHER:
        teacher = lambda: loaded(shape, run).requires_grad_(False)  # noqa: E731
    text = RandomText(model.config.vocab_size, length, count=4 * batch)
    with tempfile.TemporaryDirectory() as folder, dispatch.kernels(options.kernels):
        opened = stages.training(
            model,
            trained,
            name=stage,
            folder=Path(folder),
            run=run,
            seed=0,
            dataset=text,
            length=length,
            autocast=resolve_precision(run, device),
            teacher=teacher,
        )
        with opened as trainer:
            beside = options.out if options.only else None
            clock = Clocked(device, spend=options.seconds, profile=options.profile, beside=beside)
            trainer.add_callback(clock)
            trainer.train()
            loss = trainer.take_window()["loss"]
            needed = flops.per_token(trainer.trained_model, stage, length)
    rate = batch * length / clock.seconds
    peak = flops.peak(device, options.peak)
    return {
        "tokens_per_second": round(rate, 1),
        "milliseconds": round(1e3 * clock.seconds, 3),
        "peak_gib": clock.peak_gib,
        "mfu": None if peak is None else round(rate * needed / peak, 4),
        "mflops_per_token": round(needed / 1e6, 3),
        "first_seconds": round(clock.first, 2),
        "steps": clock.count,
        "micro_batch": trainer.micro.size,
        "loss": float(f"{loss:.5g}"),
        "note": "",
        **clock.profiled,
    }


def loaded(shape: str, run: RunConfig) -> Any:
    """The shape's model as a run loads its own."""
    device = resolve_device(run)
    return random_model(device, resolve_weights(run, device), shape)


STEP = ("shape", "way", "batch", "length")
"""What makes a step the softmax model's own that another one is compared with."""
SAME = (*STEP, "recipe", "tokens_per_second")
"""What a row must have for that."""


def compared(rows: list[Row]) -> list[Row]:
    """The rows with their tokens a second as a multiple of the softmax model's own step of the same batch."""
    softmax = {
        tuple(row[key] for key in STEP): row["tokens_per_second"] for row in rows if row["recipe"] == TEACHER
    }
    for row in rows:
        against = softmax.get(tuple(row[key] for key in STEP))
        known = against and row["tokens_per_second"]
        row["ratio"] = round(row["tokens_per_second"] / against, 3) if known else None
    return rows


class Page:
    """The rows of one command, and those that are there already, in train.json and train.md.

    Args:
        options: of the command.
        device: what the rows are measured on.
    """

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.path, self.started = options.out / "train.json", time.monotonic()
        self.budget = Budget(options.budget)
        self.about = report.facts(about(device), None, report.given(options))
        self.rows = whole.read(self.path, SAME)
        storing.make_folder(options.out)

    def add(self, row: Row) -> None:
        """Write and say a row; what other processes have written into the folder meanwhile stays."""
        row = {**row, "device": self.about["device"]["name"]}
        with FileLock(self.path.with_suffix(".lock")):
            self.rows = compared(whole.merged(whole.read(self.path, SAME), row))
            whole.write(self.path, self.rows)
            self.path.with_suffix(".md").write_text(markdown(self.about, self.rows), encoding="utf-8")
        say(f"{time.monotonic() - self.started:4.0f} s  {said(self.rows[-1])}")


def markdown(facts: dict[str, Any], rows: list[Row]) -> str:
    """A page with the command and a table of each shape and way."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    out = ["# Training steps", "", f"{facts['device']['name']}; {versions}; {facts['date']}.", ""]
    out += [f"```\n{facts['command']}\n```", "", "MFU: see `linearize/bench/flops.py` for the formula.", ""]
    for shape, kind in dict.fromkeys((row["shape"], row["way"]) for row in rows):
        mine = [row for row in rows if (row["shape"], row["way"]) == (shape, kind)]
        shown = [{head: _cell(key, row.get(key)) for key, head in SHOWN.items()} for row in mine]
        out += [f"## {shape}, {kind}", "", tables.markdown(shown), ""]
    return "\n".join(out)


def _cell(key: str, value: Any) -> Any:
    if key in ("mfu", "busy") and value is not None:
        return f"{100 * value:.1f} %"
    return value


def said(row: Row) -> str:
    """A row as a line."""
    head = f"{row['shape']:13} {row['recipe']:24} {row['stage']:8} {row['batch']:3} x {row['length']:6}"
    if row["tokens_per_second"] is None:
        return f"{head}  {row['note']}"
    parts = [f"{row['tokens_per_second']:12,.0f} tokens/s {row['milliseconds']:9.2f} ms"]
    parts += [f"{row['peak_gib']:6.2f} GiB"] if row["peak_gib"] is not None else []
    parts += [f"MFU {100 * row['mfu']:5.1f} %"] if row["mfu"] is not None else []
    parts += [f"{row['ratio']:6.3f} x softmax"] if row["ratio"] is not None else []
    parts += [f"first {row['first_seconds']:.1f} s"]
    parts += [f"{100 * row['busy']:.0f} % busy, {row['kernels']} kernels"] if "busy" in row else []
    return f"{head}  {'  '.join(parts)}"


assert set(STAGES) <= set(flops.PASSES) and set(SIZES) == set(SHAPES)
