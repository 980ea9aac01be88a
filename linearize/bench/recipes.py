"""`linearize bench recipes`: a training step of the whole model with every recipe's mixers, beside the softmax model's.

All weights train: bfloat16 weights with the mixers' own in float32, or, as the stages of a run have it, float32 weights
under bfloat16 autocast. The loss is the next token's from hidden states, which never holds the logits of all tokens; no
optimizer steps. With `--compile` the model's blocks are compiled whole, with `--captured` a step is recorded and
replayed in one CUDA graph; long stages of a run have both. Every row is written as it comes.

With `--only` several processes may share a folder and a device: each compiles in a model of few layers, what runs the
whole model they do one after the other, and while one of them times its steps the others stand still.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock

from linearize.bench import quiet, report, whole
from linearize.bench.profiles import kept
from linearize.bench.subjects import chosen, convert, layers_of_each, random_model
from linearize.bench.training_step import Step, way_of
from linearize.bench.whole import Budget, Row, Table, empty, reported
from linearize.console import console, quiet_libraries
from linearize.errors import LinearizeError

if TYPE_CHECKING:
    from linearize.distill.blocks import Blocks

WARM_BATCH = 2
"""Of the model that only compiles: a batch of one would be another kernel, since Triton makes constants of ones."""


def main(options: argparse.Namespace) -> int:
    """Measure, print every row as it comes, and write recipes.json and recipes.md.

    Args:
        options: shape, recipes (names), batch, length (tuples), precision (bf16 or autocast), device, largest (halve a
            batch that does not fit), profile, compile (the blocks), captured (replay a graph), only (no teacher, in
            turns with others), warm (compile, measure nothing), budget (seconds after which nothing new is begun), out.

    Raises:
        LinearizeError: no such recipe or shape, or no CUDA device, without which nothing is captured either.
    """
    names = chosen(options.recipes)
    device = device_of(options.device)
    if options.captured and device.type != "cuda":
        raise LinearizeError("--captured records CUDA graphs: leave out --device cpu, or --captured")
    quiet_libraries()
    torch.set_float32_matmul_precision("high")  # as a run has it
    random_model("meta", torch.float32, options.shape)
    if options.warm:
        for name in names:
            say(
                warmed(
                    name,
                    options.shape,
                    (*options.batch, WARM_BATCH),
                    options.length,
                    options.precision,
                    device,
                    compiled=options.compile,
                    captured=options.captured,
                )
            )
        return 0
    table = Table(options.out, say, about(device), report.given(options))
    whole.fill(table, names, lambda name, budget: rows(name, options, device, budget), options)
    say(f"recipes.json and recipes.md in {options.out}")
    return 0


def rows(name: str, options: argparse.Namespace, device: torch.device, budget: Budget) -> Iterator[Row]:
    """The rows of one recipe, or of the teacher."""
    model, step, ahead = None, None, None
    turn = FileLock(options.out / quiet.TURN) if options.only else nullcontext()
    switches = {"compiled": options.compile, "captured": options.captured}
    way = way_of(options.precision, **switches)
    if options.only and not budget.spent:
        # what fails here fails again where it makes a row
        with reported():
            ahead = compiled_ahead(
                name, options.shape, options.batch, options.length, options.precision, device, **switches
            )
    for length in options.length:
        batches = sorted(options.batch, reverse=options.largest)[: 1 if options.largest else None]
        while batches:
            batch = batches.pop(0)
            key = {"measured": "train", "shape": options.shape, "recipe": name, "way": way}
            row: Row = {**key, "batch": batch, "length": length}
            if budget.spent:
                yield row | empty("not run: the budget is spent")
                continue
            found: Row = {}
            with reported() as notes:
                if step is None:
                    model = build(name, options.shape, options.precision, device)
                    others = options.out if options.only else None
                    step = Step(model, device, options.precision, like=ahead, beside=others, **switches)
            with turn:
                if step is not None:
                    with reported() as notes:
                        found = step.measured(batch, length)
                profile: Row = {}
                if not notes and options.profile and step is not None:
                    with reported() as unseen:
                        profile = step.profiled(found["milliseconds"])
                    profile = profile or {"note": unseen[0]}
                if step is not None:
                    step.release()
                whole.release()  # the frames of a failure are gone only now
            budget.leave_out(found)
            row["way"] = found.get("way", way)
            yield row | (empty(notes[0]) if notes else found)
            if notes and options.largest and batch > 1 and "out of memory" in notes[0]:
                batches = [batch // 2]
            elif "busy" in profile:
                kept(options.out, row | profile)
                say(f"       {100 * profile['busy']:5.1f} % busy, {profile['kernels']} kernels")
            elif profile:
                say(f"       not profiled: {profile['note']}")
    del model, step
    whole.release()


def build(name: str, shape: str, precision: str, device: torch.device, **changes: Any) -> Any:
    """A subject's model, all of whose weights train."""
    dtype = torch.float32 if precision == "autocast" else torch.bfloat16
    model = convert(random_model(device, dtype, shape, **changes), name)
    return model.requires_grad_(True)


def warmed(
    name: str,
    shape: str,
    batches: tuple[int, ...],
    lengths: tuple[int, ...],
    precision: str,
    device: torch.device,
    *,
    compiled: bool = False,
    captured: bool = False,
) -> str:
    """Compile what a recipe's training and decoding need, in a model of few layers; gives a line to print.

    What stands between the kernels is compiled for each batch and length.
    """
    from linearize.decode import Decoder

    started, layers = time.monotonic(), layers_of_each(name)
    with reported() as notes:
        compiled_ahead(name, shape, batches, lengths, precision, device, compiled=compiled, captured=captured)
        model = build(name, shape, "bf16", device, num_hidden_layers=layers).requires_grad_(False)
        for batch in (1, 64):
            ids = torch.zeros(batch, 128, dtype=torch.int64, device=device)
            Decoder(model, batch, length=256, capture=False).generate(ids, None, 4)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return f"{time.monotonic() - started:4.0f} s  {name}{': ' + notes[0] if notes else ''}"


def compiled_ahead(
    name: str,
    shape: str,
    batches: tuple[int, ...],
    lengths: tuple[int, ...],
    precision: str,
    device: torch.device,
    *,
    compiled: bool = False,
    captured: bool = False,
) -> Blocks:
    """Compile what this process' training steps of these sizes need, in a model of few layers, whose blocks it gives.

    A step that will be recorded runs once as it does before its recording, and leaves nothing behind.
    """
    model = build(name, shape, precision, device, num_hidden_layers=layers_of_each(name))
    step = Step(model, device, precision, compiled=compiled, captured=captured)
    for batch in dict.fromkeys(batches):
        for length in lengths:
            step.call(batch, length)()
            step.release()
    return step.blocks


def device_of(name: str) -> torch.device:
    """Where to measure.

    Raises:
        LinearizeError: there is no CUDA device, and the CPU was not asked for.
    """
    from linearize.bench.clock import require_cuda

    if name == "cpu":
        return torch.device("cpu")
    require_cuda()
    return torch.device("cuda", torch.cuda.current_device())


def about(device: torch.device) -> dict[str, Any]:
    """The device, for the table."""
    from linearize.bench.clock import described

    return described() if device.type == "cuda" else {"name": "CPU"}


def say(line: str) -> None:
    """Print at once."""
    console().print(line, markup=False, soft_wrap=True, highlight=False)
