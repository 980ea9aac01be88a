"""Tokens a second of stages with one process and with several, row by row into docs/results/scale-*.json and .md.

    python scripts/scale.py --out docs/results/scale-h200x2.json --shapes smollm2-135m llama-3.2-1b llama-3-8b
    python scripts/scale.py --out docs/results/scale-h200x2.json --shapes llama-3-8b --stages all_kl --shard full
    python scripts/scale.py --out docs/results/scale-h200x2.json --shapes smollm2-360m --stages all_kl --sequence 2 \\
        --recipe gated_deltanet --batch 1 --length 131072 --warm 2
    python scripts/scale.py --shapes tiny --device cpu --length 64 --batch 2 --seconds 1 --out /tmp/scale.json

Each row is a stage's own trainer (`scale_steps.py`): random weights of the shape, random text, as many sequences for
each process, or with --sequence for so many of them together. Rows of one process come first, one for each card side by
side, so that a card is as warm as beside its neighbours; then one `torchrun` makes all rows of several. `scaling` is
tokens a second over those of one process. Rows that are there already are kept, so that a machine that is lent for
minutes goes on where it ended. `scripts/results/scale_page.py` makes the page and the table of docs/scale.md of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from scale_steps import TOO_LARGE, Row, length_of
from scale_steps import options as both

from linearize.bench.train import STAGES, too_large

MEASURED = ("transfer", "lora_kl", "all_kl")
COLUMNS = {
    "shape": "shape", "stage": "stage", "processes": "cards", "shard": "shards", "sequence": "cards a sequence",
    "batch": "batch", "length": "length", "micro_batch": "at once", "tokens_per_second": "tokens/s",
    "peak_gib": "GiB a card", "scaling": "times one card", "note": "note",
}  # fmt: skip
HANDED_ON = ("device", "recipe", "batch", "at_once", "seconds", "warm")


def main() -> None:
    options = _options()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    count = options.processes or (torch.cuda.device_count() if options.device == "cuda" else 2)
    page = Page(options)
    asked = [
        (shape, stage, options.length or length_of(shape))
        for shape in options.shapes
        for stage in options.stages
    ]
    if options.shard == "none" and options.device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
        asked = [row for row in asked if too_large(row[1], row[0], memory) is None]
    several = [
        Row(shape, stage, count, options.shard, length, options.sequence) for shape, stage, length in asked
    ]
    alone = [Row(shape, stage, 1, "none", length, 1) for shape, stage, length in asked]
    several = [] if options.only == "one" else page.missing(several)
    alone = [] if options.only == "several" else page.missing(alone)
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=[both()])
    parser.add_argument("--out", type=Path, default=Path("docs/results/scale.json"))
    parser.add_argument("--shapes", nargs="+", default=["smollm2-135m", "llama-3.2-1b"])
    parser.add_argument("--stages", nargs="+", default=list(MEASURED), choices=list(STAGES))
    parser.add_argument("--processes", type=int, default=0, help="beside one; default: all cards")
    parser.add_argument(
        "--shard", default="none", choices=["none", "full"], help="of rows of several processes"
    )
    parser.add_argument(
        "--only", choices=["one", "several"], help="rows of one process, or of several, alone"
    )
    parser.add_argument(
        "--sequence", type=int, default=1, help="processes that hold each sequence, of rows of several"
    )
    parser.add_argument("--length", type=int, default=0, help="default: of `bench train`")
    parser.add_argument("--limit", type=int, default=200, help="seconds that a row may take")
    parser.add_argument("--again", action="store_true", help="measure what has a row already once more")
    parser.add_argument("--commit", default="", help="of what is measured, for the rows")
    return parser.parse_args()


class Page:
    """The rows, in a file and its table, written whenever there is another one."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.path: Path = options.out
        self.again = options.again
        name = torch.cuda.get_device_name() if options.device == "cuda" else options.device
        self.about = {"device": name, "torch": torch.__version__}
        if options.device == "cuda":
            self.about["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        command = " ".join(["python", *sys.argv])
        date = datetime.now(UTC).date().isoformat()
        self.of_each = {"recipe": options.recipe, "commit": options.commit, "date": date, "command": command}
        known = json.loads(self.path.read_text())["rows"] if self.path.is_file() else []
        self.rows: list[dict[str, Any]] = known
        self._lock = threading.Lock()

    def missing(self, rows: list[Row]) -> list[Row]:
        """Those that have no figure yet, and have not been too large."""
        return [row for row in rows if self.again or not any(map(_settled, self._of(row)))]

    def _of(self, row: Row) -> list[dict[str, Any]]:
        return [old for old in self.rows if vars(row).items() <= ({"sequence": 1} | old).items()]

    def add(self, row: Row, found: dict[str, Any]) -> None:
        """Write and say a row."""
        with self._lock:
            old = self._of(row)
            self.rows = [other for other in self.rows if other not in old]
            self.rows.append({**vars(row), **found, **self.of_each})
            self.rows = scaled(self.rows)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({**self.about, "rows": self.rows}, indent=1) + "\n")
            self.path.with_suffix(".md").write_text(self._table())
            print(json.dumps({**vars(row), **found}), flush=True)

    def _table(self) -> str:
        from linearize.eval import tables

        shown = [{head: row.get(key) for key, head in COLUMNS.items()} for row in self.rows]
        about = "; ".join(f"{key} {value}" for key, value in self.about.items())
        return f"# One card and several\n\n{about}\n\n{tables.markdown(shown)}\n"


def scaled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with its tokens a second over those of one process with as many tokens a step."""
    alone = {_what(row): row["tokens_per_second"] for row in rows if row["processes"] == 1}
    for row in rows:
        base, rate = alone.get(_what(row)), row["tokens_per_second"]
        row["scaling"] = round(rate / base, 3) if base and rate else None
    return rows


def _what(row: dict[str, Any]) -> tuple[Any, ...]:
    own = row["batch"] * row.get("sequence", 1) // row["processes"]
    return row["shape"], row["stage"], row["length"], own


def _settled(row: dict[str, Any]) -> bool:
    return bool(row["tokens_per_second"]) or row["note"].startswith(TOO_LARGE)


# In the processes that were started


def _launched(rows: list[Row], card: int, options: argparse.Namespace, page: Page) -> None:
    """Rows, by processes of their own: begun anew with the row after one that failed or took too long."""
    while rows:
        done = _lines(_command(rows, options), rows[0].processes == 1, card, options)
        for found, row in zip(done.found, rows, strict=False):
            page.add(row, found)
        rows = rows[len(done.found) :]
        if rows:
            empty = {"batch": 0, "tokens_per_second": None, "peak_gib": None}
            page.add(rows[0], {**empty, "note": done.failure[-300:]})
            print(f"{rows[0]} failed:\n{done.failure[-6000:]}", flush=True)
            rows = rows[1:]


def _command(rows: list[Row], options: argparse.Namespace) -> list[str]:
    number = rows[0].processes
    launcher = ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(number)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    given = ["--rows", json.dumps([list(vars(row).values()) for row in rows])]
    for key in HANDED_ON:
        given += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    steps = str(Path(__file__).with_name("scale_steps.py"))
    return [sys.executable, *(launcher if number > 1 else []), steps, *given]


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
            _end(process)
    os._exit(128 + number)


def _end(process: subprocess.Popen[str]) -> None:
    """A launch and whoever it started: processes of a launcher have sessions of their own, and hold its output open."""
    own = psutil.Process(process.pid)
    for one in [*own.children(recursive=True), own]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


class _Alarm:
    """Ends a launch that says nothing for so many seconds."""

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
        with contextlib.suppress(psutil.NoSuchProcess):
            _end(self.process)


if __name__ == "__main__":
    began = time.monotonic()
    main()
    print(f"{time.monotonic() - began:.0f} s", flush=True)
