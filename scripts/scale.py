"""Tokens a second of stages with one process and with several, row by row into docs/results/scale-*.json and .md.

    python scripts/scale.py --out docs/results/scale-h200x2.json --shapes llama-3-8b --stages all_kl --shard full
    python scripts/scale.py --out docs/results/scale-h200x2.json --shapes smollm2-135m llama-3.2-1b llama-3-8b
    python scripts/scale.py --out docs/results/scale-h200x2.json --shapes smollm2-360m --stages all_kl --sequence 2 \\
        --recipe gated_deltanet --batch 1 --length 131072
    python scripts/scale.py --shapes tiny --device cpu --length 64 --batch 2 --seconds 1 --out /tmp/scale.json

Each row is a stage's own trainer: random weights of the shape, random text, as many sequences for each process, or with
--sequence for so many of them together. Rows of one process come first, one for each card side by side, so that a card
is as warm as beside its neighbours; then one `torchrun` makes all rows of several. `scaling` is tokens a second over
those of one process. Rows that are there already are kept, so that a machine that is lent for minutes goes on where it
ended.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from linearize import launched
from linearize.bench.steps import Clocked
from linearize.bench.train import STAGES, RandomText, convert, random_model, too_large
from linearize.config.schema import Recipe, RunConfig, StageConfig
from linearize.distill import processes, shards, stages
from linearize.distill.device import resolve_device, resolve_precision, resolve_weights
from linearize.distill.memory import is_out_of_memory

MEASURED = ("transfer", "lora_kl", "all_kl")
STEPS = 10_000
"""Of the stage; the clock ends it."""
BATCH = {"llama-3-8b": 8}
"""Sequences of a step for each process where it is not 16."""
AT_ONCE = {("llama-3-8b", "all_kl"): 2}
"""Of these, where as many as fit would have to be found: in shards nobody can begin a step again."""
TOO_LARGE = "out of memory"
COLUMNS = {
    "shape": "shape", "stage": "stage", "processes": "cards", "shard": "shards", "batch": "batch", "length": "length",
    "sequence": "cards a sequence", "micro_batch": "at once", "tokens_per_second": "tokens/s", "peak_gib": "peak GiB",
    "scaling": "times one card", "note": "note",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What is measured."""

    shape: str
    stage: str
    processes: int
    shard: str
    length: int
    sequence: int


def main() -> None:
    options = _options()
    if options.rows:
        _work([Row(*row) for row in json.loads(options.rows)], options)
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    count = options.processes or (torch.cuda.device_count() if options.device == "cuda" else 2)
    page = Page(options)
    asked = [(shape, stage) for shape in options.shapes for stage in options.stages]
    if options.shard == "none" and options.device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
        asked = [(shape, stage) for shape, stage in asked if too_large(stage, shape, memory) is None]
    several = (
        []
        if options.only == "one"
        else [Row(*pair, count, options.shard, options.length, options.sequence) for pair in asked]
    )
    alone = [] if options.only == "several" else [Row(*pair, 1, "none", options.length, 1) for pair in asked]
    several, alone = page.missing(several), page.missing(alone)
    # shards are for what one card does not hold: there the rows that say so come last
    for rows in (several, alone) if options.shard == "full" else (alone, several):
        shares = [rows] if rows is several else [rows[number::count] for number in range(count)]
        threads = [
            threading.Thread(target=_launched, args=(share, number, options, page))
            for number, share in enumerate(shares)
            if share
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results/scale.json"))
    parser.add_argument("--shapes", nargs="+", default=["smollm2-135m", "llama-3.2-1b"])
    parser.add_argument("--stages", nargs="+", default=list(MEASURED), choices=list(STAGES))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--processes", type=int, default=0, help="beside one; default: all cards")
    parser.add_argument("--recipe", default="lolcats")
    parser.add_argument(
        "--shard", default="none", choices=["none", "full"], help="of rows of several processes"
    )
    parser.add_argument(
        "--only", choices=["one", "several"], help="rows of one process, or of several, alone"
    )
    parser.add_argument("--batch", type=int, default=0, help="sequences of a step for each process")
    parser.add_argument("--at-once", type=int, default=0, help="of these; default: as many as fit")
    parser.add_argument(
        "--sequence", type=int, default=1, help="processes that hold each sequence, of rows of several"
    )
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--limit", type=int, default=100, help="seconds that a row may take")
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    return parser.parse_args()


class Page:
    """The rows, in a file and its table, written whenever there is another one."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.path: Path = options.out
        self.device = options.device
        known = json.loads(self.path.read_text())["rows"] if self.path.is_file() else []
        self.rows: list[dict[str, Any]] = known
        self._lock = threading.Lock()

    def missing(self, rows: list[Row]) -> list[Row]:
        """Those that have no figure yet, and have not been too large."""
        return [row for row in rows if not any(map(_settled, self._of(row)))]

    def _of(self, row: Row) -> list[dict[str, Any]]:
        return [old for old in self.rows if vars(row).items() <= ({"sequence": 1} | old).items()]

    def add(self, row: Row, found: dict[str, Any]) -> None:
        """Write and say a row."""
        with self._lock:
            old = self._of(row)
            self.rows = [other for other in self.rows if other not in old]
            self.rows.append({**vars(row), **found})
            alone = {_what(one): one["tokens_per_second"] for one in self.rows if one["processes"] == 1}
            for one in self.rows:
                base, rate = alone.get(_what(one)), one["tokens_per_second"]
                one["scaling"] = round(rate / base, 3) if base and rate else None
            name = torch.cuda.get_device_name() if self.device == "cuda" else self.device
            command = " ".join(["python", *sys.argv])
            about = {"command": command, "torch": torch.__version__, "device": name}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({**about, "rows": self.rows}, indent=1) + "\n")
            self.path.with_suffix(".md").write_text(self._table(about))
            print(json.dumps({**vars(row), **found}), flush=True)

    def _table(self, about: dict[str, Any]) -> str:
        from linearize.eval import tables

        shown = [{head: row.get(key) for key, head in COLUMNS.items()} for row in self.rows]
        head = f"# One card and several\n\n{about['device']}; torch {about['torch']}.\n\n```\n{about['command']}\n```\n"
        return f"{head}\n{tables.markdown(shown)}\n"


def _what(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["shape"], row["stage"], row["length"]


def _settled(row: dict[str, Any]) -> bool:
    return bool(row["tokens_per_second"]) or row["note"].startswith(TOO_LARGE)


# In the process that was started


def _launched(rows: list[Row], card: int, options: argparse.Namespace, page: Page) -> None:
    """Rows, by processes of their own: begun anew with the row after one that failed or took too long."""
    while rows:
        done = _lines(_command(rows, options), rows[0].processes == 1, card, options)
        for found, row in zip(done.found, rows, strict=False):
            page.add(row, found)
        rows = rows[len(done.found) :]
        if rows:
            empty = {"tokens_per_second": None, "peak_gib": None}
            page.add(rows[0], {**empty, "note": done.failure[-300:]})
            print(f"{rows[0]} failed:\n{done.failure[-6000:]}", flush=True)
            rows = rows[1:]


def _command(rows: list[Row], options: argparse.Namespace) -> list[str]:
    number = rows[0].processes
    launcher = ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(number)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    given = ["--rows", json.dumps([list(vars(row).values()) for row in rows])]
    for key in ("device", "recipe", "batch", "at_once", "length", "seconds"):
        given += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    return [sys.executable, *(launcher if number > 1 else []), __file__, *given]


@dataclass
class Said:
    """What a launch has given: rows, and why it ended before the last one."""

    found: list[dict[str, Any]]
    failure: str


def _lines(command: list[str], alone: bool, card: int, options: argparse.Namespace) -> Said:
    """Read rows as they come; a launch that gives none for `limit` seconds is ended."""
    environment = dict(os.environ)
    if alone and options.device == "cuda":
        own = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        environment["CUDA_VISIBLE_DEVICES"] = own[card] if len(own) > card and own[card] else str(card)
    said = Said([], "")
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,
        )
        _started.append(process)
        late = _Alarm(options.limit, process)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                said.found.append(json.loads(line))
                late.again()
        process.wait()
        late.off()
        errors.seek(0)
        said.failure = f"not done after {options.limit} s\n" if late.rang else ""
        said.failure += errors.read().strip() or "it said nothing"
    return said


_started: list[subprocess.Popen[str]] = []


def _stop(number: int, *_: Any) -> None:
    """What is stopped leaves nobody on the cards."""
    for process in _started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    os._exit(128 + number)


class _Alarm:
    """Ends a process group that says nothing for so many seconds."""

    def __init__(self, seconds: float, process: subprocess.Popen[str]) -> None:
        self.seconds, self.process, self.rang = seconds, process, False
        self._timer = threading.Timer(0, lambda: None)
        self.again()

    def again(self) -> None:
        self.off()
        self._timer = threading.Timer(self.seconds, self._ring)
        self._timer.daemon = True
        self._timer.start()

    def off(self) -> None:
        self._timer.cancel()

    def _ring(self) -> None:
        self.rang = True
        os.killpg(self.process.pid, signal.SIGKILL)


# In the processes that measure


def _work(rows: list[Row], options: argparse.Namespace) -> None:
    """All rows, one after the other; what cannot be shared with other processes ends this one."""
    if sys.platform == "linux":
        # PR_SET_PDEATHSIG: torchrun's end is this one's, however it came
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() == 1:
        os._exit(1)  # it came while this was importing
    run = RunConfig(device=options.device)
    device = resolve_device(run)
    with processes.joined(device):
        torch.set_float32_matmul_precision("high")
        for row in rows:
            run = RunConfig(device=options.device, sequence=row.sequence)
            try:
                found = _measured(row, run, device, options)
            except Exception as error:
                if processes.several() or not is_out_of_memory(error):
                    raise
                found = _empty(row, options) | {"note": f"{TOO_LARGE}: {' '.join(str(error).split())[:120]}"}
            if launched.first():
                print(json.dumps(found), flush=True)
            torch._dynamo.reset()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _empty(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    batch = (options.batch or BATCH.get(row.shape, 16)) * (row.processes // row.sequence)
    return {"batch": batch, "length": row.length, "tokens_per_second": None, "peak_gib": None}


def _measured(row: Row, run: RunConfig, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    found = _empty(row, options)
    batch, weights, passes = found["batch"], resolve_weights(run, device), resolve_precision(run, device)
    settings = StageConfig(
        **STAGES[row.stage],
        tokens=STEPS * batch * options.length,
        batch_size=batch,
        micro_batch=options.at_once or AT_ONCE.get((row.shape, row.stage), "auto"),
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
    model = convert(random_model(device, weights, row.shape), options.recipe)
    if sharded:
        shards.widen(model, Recipe(stages={row.stage: settings}))
        shards.into_shards(model, device, passes if trains else None)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    text = RandomText(model.config.vocab_size, options.length, count=4 * batch)
    with tempfile.TemporaryDirectory() as folder:
        opened = stages.training(
            model,
            settings,
            name=row.stage,
            folder=Path(folder),
            run=run,
            seed=0,
            dataset=text,
            length=options.length,
            autocast=passes,
            teacher=teacher if trains else None,
        )
        with opened as trainer:
            clock = Together(device, spend=options.seconds, profile=False)
            trainer.add_callback(clock)
            trainer.train()
            loss = float(trainer.take_window()["loss"])
    return found | {
        "tokens_per_second": round(batch * options.length / clock.seconds, 1),
        "milliseconds": round(1e3 * clock.seconds, 2),
        "peak_gib": clock.peak_gib,
        "micro_batch": trainer.micro.size,
        "first_seconds": round(clock.first, 2),
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
    began = time.monotonic()
    main()
    if "--rows" not in sys.argv:
        print(f"{time.monotonic() - began:.0f} s", flush=True)
