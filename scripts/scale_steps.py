"""What `scripts/scale.py` starts, alone or by torchrun: rows one after the other, a line of JSON for each.

Each row is a stage's own trainer on random weights and random text, as a run makes it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from linearize import launched
from linearize.bench.steps import Clocked
from linearize.bench.train import SIZES, STAGES, RandomText, convert, random_model
from linearize.config.schema import Recipe, RunConfig, StageConfig
from linearize.distill import processes, shards, stages
from linearize.distill.device import resolve_device, resolve_precision, resolve_weights
from linearize.distill.memory import is_out_of_memory

STEPS = 10_000
"""Of the stage; the clock ends it."""
AT_ONCE = {("llama-3-8b", "all_kl"): 8}
"""Sequences at once, where as many as fit would have to be found: in shards nobody can begin a step again."""
TOO_LARGE = "out of memory"


@dataclass(frozen=True)
class Row:
    """What is measured."""

    shape: str
    stage: str
    processes: int
    shard: str
    length: int
    sequence: int


def options() -> argparse.ArgumentParser:
    """What both scripts take."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--recipe", default="lolcats")
    parser.add_argument(
        "--batch", type=int, default=0, help="sequences of a step for each process; default: of `bench train`"
    )
    parser.add_argument("--at-once", type=int, default=0, help="of these; default: as many as fit")
    parser.add_argument("--seconds", type=float, default=4, help="of timed steps, three at least")
    parser.add_argument("--warm", type=int, default=4, help="steps before them")
    return parser


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=[options()])
    parser.add_argument("--rows", required=True, help="JSON: the fields of each row")
    given = parser.parse_args()
    if sys.platform == "linux":
        # PR_SET_PDEATHSIG: torchrun's end is this one's, however it came
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() == 1:
        os._exit(1)  # it came while this was importing
    run = RunConfig(device=given.device)
    device = resolve_device(run)
    with processes.joined(device):
        torch.set_float32_matmul_precision("high")
        for row in (Row(*fields) for fields in json.loads(given.rows)):
            run = RunConfig(device=given.device, sequence=row.sequence)
            try:
                found = measured(row, run, device, given)
            except Exception as error:
                if processes.several() or not is_out_of_memory(error):
                    raise
                found = empty(row, given) | {"note": f"{TOO_LARGE}: {' '.join(str(error).split())[:120]}"}
            if launched.first():
                print(json.dumps(found), flush=True)
            torch._dynamo.reset()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def length_of(shape: str) -> int:
    """Tokens of a sequence where nobody says how many: those of `bench train`."""
    return SIZES[shape][1]


def batch_of(row: Row, given: argparse.Namespace) -> int:
    """Sequences of a step over all processes: as many tokens for each as `bench train` has, if nothing is said."""
    batch, length = SIZES[row.shape]
    own = given.batch or max(1, batch * length // row.length)
    return own * (row.processes // row.sequence)


def empty(row: Row, given: argparse.Namespace) -> dict[str, Any]:
    """A row without a figure."""
    return {"batch": batch_of(row, given), "tokens_per_second": None, "peak_gib": None}


def measured(row: Row, run: RunConfig, device: torch.device, given: argparse.Namespace) -> dict[str, Any]:
    """One row.

    Args:
        row: which.
        run: its `device` and `sequence`.
        device: of this process.
        given: `options`.
    """
    batch, weights, passes = (
        batch_of(row, given),
        resolve_weights(run, device),
        resolve_precision(run, device),
    )
    settings = StageConfig(
        **STAGES[row.stage],
        tokens=STEPS * batch * row.length,
        batch_size=batch,
        micro_batch=given.at_once or AT_ONCE.get((row.shape, row.stage), "auto"),
        log_every=STEPS,
        save_every=2 * STEPS,
    )
    sharded, trains = row.shard == "full", "all" in settings.train

    def teacher() -> Any:
        original = random_model(device, weights, row.shape).requires_grad_(False)
        if sharded:
            shards.into_shards(original, device)
        return original

    # random weights are made on the card, which holds them whole before anything trains; a CPU takes minutes
    model = convert(random_model(device, weights, row.shape), given.recipe)
    if sharded:
        shards.widen(model, Recipe(stages={row.stage: settings}))
        shards.into_shards(model, device, passes if trains else None)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    text = RandomText(model.config.vocab_size, row.length, count=4 * batch)
    with tempfile.TemporaryDirectory() as folder:
        opened = stages.training(
            model,
            settings,
            name=row.stage,
            folder=Path(folder),
            run=run,
            seed=0,
            dataset=text,
            length=row.length,
            autocast=passes,
            teacher=teacher if trains else None,
        )
        with opened as trainer:
            clock = Together(device, spend=given.seconds, profile=False, warm=given.warm)
            trainer.add_callback(clock)
            trainer.train()
            loss = float(trainer.take_window()["loss"])
            blocks = trainer.passes.blocks
            compiled = blocks is not None and bool(blocks.layers) and blocks.obstacle is None
            recorded = trainer.passes.captured.graph is not None
    return empty(row, given) | {
        "tokens_per_second": round(batch * row.length / clock.seconds, 1),
        "milliseconds": round(1e3 * clock.seconds, 2),
        "peak_gib": clock.peak_gib,
        "micro_batch": trainer.micro.size,
        "first_seconds": round(clock.first, 2),
        "recorded": recorded,
        "compiled": compiled,
        "loss": float(f"{loss:.5g}"),
        "note": "",
    }


class Together(Clocked):
    """A clock that ends the stage in all processes after the same step: the first one's clock decides."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        [stop] = processes.most([int(control.should_training_stop and launched.first())])
        if stop and not self.seconds:
            self._conclude()  # the first one's clock was ahead of this one's
        control.should_training_stop = bool(stop)


if __name__ == "__main__":
    main()
