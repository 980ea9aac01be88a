"""Tokens a second of stages with one process and with several, row by row into docs/results/scale-<device>.json.

    python scripts/scale.py --out docs/results/scale-h100x2.json
    python scripts/scale.py --out docs/results/scale-h100x2.json --shapes llama-3-8b --stages all_kl --shard full
    python scripts/scale.py --out docs/results/scale-h100x2.json --shapes smollm2-360m --stages all_kl --sequence 2 \\
        --recipe gated_deltanet --batch 1 --length 131072
    python scripts/scale.py --shapes tiny --device cpu --length 64 --batch 2 --seconds 2 --out /tmp/scale.json

Each row is a `torchrun` of this file over a stage's own trainer: random weights of the shape, random text, `batch`
sequences for each process, or with --sequence for so many of them together. `scaling` is tokens a second over those of
one process with as many sequences. Rows that are there already are kept, so that a machine that is lent for minutes
goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from linearize import launched
from linearize.bench.steps import Clocked
from linearize.bench.train import STAGES, RandomText, convert, random_model
from linearize.config.schema import Recipe, RunConfig, StageConfig
from linearize.distill import processes, shards, stages
from linearize.distill.device import resolve_device, resolve_precision, resolve_weights
from linearize.distill.memory import is_out_of_memory

MEASURED = ("transfer", "lora_kl", "all_kl")
STEPS = 10_000
"""Of the stage; the clock ends it."""
OUT_OF_MEMORY = "out of memory"


def main() -> None:
    options = _options()
    if options.row:
        shape, stage = options.row
        found = _measured(shape, stage, options)
        if launched.first():
            print(json.dumps(found), flush=True)
        return
    count = options.processes or (torch.cuda.device_count() if options.device == "cuda" else 2)
    rows: list[dict[str, Any]] = json.loads(options.out.read_text())["rows"] if options.out.is_file() else []
    for shape in options.shapes:
        for stage in options.stages:
            for number in (1, count) if options.only is None else (options.only,):
                shard = options.shard if number > 1 else "none"
                together = options.sequence if number > 1 else 1
                key = {
                    "shape": shape,
                    "stage": stage,
                    "processes": number,
                    "shard": shard,
                    "sequence": together,
                }
                key |= {"length": options.length}
                # rows from before there were shards and spread sequences do not say
                plain = {"shard": "none", "sequence": 1}
                found = [row for row in rows if key.items() <= (plain | row).items()]
                if any(row["tokens_per_second"] or row["note"] == OUT_OF_MEMORY for row in found):
                    continue
                rows = [row for row in rows if row not in found]
                rows.append({**key, **_started(shape, stage, number, options)})
                _compare(rows)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                command = " ".join(["python", *sys.argv])
                about = {"command": command, "torch": torch.__version__, "device": _name(options.device)}
                options.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
                print(json.dumps(rows[-1]), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results/scale.json"))
    parser.add_argument("--shapes", nargs="+", default=["smollm2-135m", "llama-3.2-1b"])
    parser.add_argument("--stages", nargs="+", default=list(MEASURED), choices=list(STAGES))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--processes", type=int, default=0, help="beside one; default: all cards")
    parser.add_argument("--only", type=int, help="rows of so many processes alone")
    parser.add_argument("--recipe", default="lolcats")
    parser.add_argument(
        "--shard", default="none", choices=["none", "full"], help="of rows of several processes"
    )
    parser.add_argument(
        "--sequence", type=int, default=1, help="processes that hold each sequence, of rows of several"
    )
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step for each process")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=12)
    parser.add_argument("--limit", type=int, default=150, help="seconds that a row may take")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def _started(shape: str, stage: str, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """A row, by processes of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    given = ["--row", shape, stage, "--device", options.device, "--recipe", options.recipe]
    given += ["--shard", options.shard if number > 1 else "none"]
    given += ["--sequence", str(options.sequence if number > 1 else 1)]
    given += [
        "--batch",
        str(options.batch),
        "--length",
        str(options.length),
        "--seconds",
        str(options.seconds),
    ]
    command = [sys.executable, *(launcher if number > 1 else []), __file__, *given]
    groups = number // options.sequence if number > 1 else 1
    empty = {"batch": options.batch * groups, "length": options.length, "tokens_per_second": None}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.limit, check=False)
    except subprocess.TimeoutExpired:
        return {**empty, "peak_gib": None, "note": f"not done after {options.limit} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if lines:
        found: dict[str, Any] = json.loads(lines[-1])
        return found
    return {**empty, "peak_gib": None, "note": done.stderr.strip()[-300:] or "it said nothing"}


def _measured(shape: str, stage: str, options: argparse.Namespace) -> dict[str, Any]:
    """In one of the processes of a row."""
    run = RunConfig(device=options.device, sequence=options.sequence)
    device = resolve_device(run)
    with processes.joined(device), tempfile.TemporaryDirectory() as folder:
        weights = resolve_weights(run, device)
        torch.set_float32_matmul_precision("high")
        batch = options.batch * (processes.count() // options.sequence)
        settings = StageConfig(
            **STAGES[stage],
            tokens=STEPS * batch * options.length,
            batch_size=batch,
            log_every=STEPS,
            save_every=2 * STEPS,
        )
        passes, sharded = resolve_precision(run, device), options.shard == "full"
        home = torch.device("cpu") if sharded else device

        def teacher() -> Any:
            original = random_model(home, weights, shape).requires_grad_(False)
            if sharded:
                shards.into_shards(original, device)
            return original

        model = convert(random_model(home, weights, shape), options.recipe)
        if sharded:
            shards.widen(model, Recipe(stages={stage: settings}))
            shards.into_shards(model, device, passes if "all" in settings.train else None)
        text = RandomText(model.config.vocab_size, options.length, count=4 * batch)
        opened = stages.training(
            model,
            settings,
            name=stage,
            folder=Path(folder),
            run=run,
            seed=0,
            dataset=text,
            length=options.length,
            autocast=passes,
            teacher=teacher if "all" in settings.train else None,
        )
        found = {"batch": batch, "length": options.length, "tokens_per_second": None, "peak_gib": None}
        with opened as trainer:
            clock = Together(device, spend=options.seconds, profile=False)
            trainer.add_callback(clock)
            try:
                trainer.train()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                return {**found, "note": OUT_OF_MEMORY}
        rate = batch * options.length / clock.seconds
        return {
            **found,
            "tokens_per_second": round(rate, 1),
            "peak_gib": clock.peak_gib,
            "micro_batch": trainer.micro.size,
            "note": "",
        }


class Together(Clocked):
    """A clock that ends the stage in all processes after the same step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        [stop] = processes.most([int(control.should_training_stop)])
        control.should_training_stop = bool(stop)


def _compare(rows: list[dict[str, Any]]) -> None:
    """Fill `scaling` in."""
    alone = {
        (row["shape"], row["stage"], row["length"]): row["tokens_per_second"]
        for row in rows
        if row["processes"] == 1
    }
    for row in rows:
        base, rate = alone.get((row["shape"], row["stage"], row["length"])), row["tokens_per_second"]
        row["scaling"] = round(rate / base, 3) if base and rate else None


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else device


if __name__ == "__main__":
    began = time.monotonic()
    main()
    if launched.first() and "--row" not in sys.argv:
        print(f"{time.monotonic() - began:.0f} s", flush=True)
