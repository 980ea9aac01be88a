"""Requests/s and tokens/s of `linearize serve`: a conversion and its teacher, each in a process of its own, at several
lengths of prompts and numbers of requests at once.

Every request is a stream of random pieces of the packaged text, as ids, so that all prompts have the length asked for;
texts go on behind tokens that end them, so that all answers have. Every row goes into a JSON file and a table beside
it.

    python scripts/serve_load.py runs/demo --against smollm2-135m --prompt 128 1024 --out docs/results/serve.json
    python scripts/serve_load.py runs/demo --at 1 64 512 --prompt 8192 --tokens 128 --server "--max-prompt-tokens 8192"
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openai
import pyarrow.parquet
from serve_results import put

from linearize import models
from linearize.data import builtin

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """One model at one length of prompts and number of requests at once.

    Attributes:
        model: name.
        prompt: tokens.
        at_once: requests.
        requests, seconds: how many, and how long they took together.
        requests_per_second, tokens_per_second: of new tokens.
        first_token, request: medians, in seconds.
        slot_mib: state of a slot.
        peak_mib: of the server's process so far, weights included.
    """

    model: str
    prompt: int
    at_once: int
    requests: int
    seconds: float
    requests_per_second: float
    tokens_per_second: float
    first_token: float
    request: float
    slot_mib: float
    peak_mib: float


def main(arguments: list[str] | None = None) -> int:
    """Measure and write."""
    options = _options(arguments)
    rows: list[Row] = []
    found: dict[str, Any] = {
        "command": shlex.join(["python", "scripts/serve_load.py", *(arguments or sys.argv[1:])]),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _said("git", "describe", "--always", "--dirty"),
        "machine": _machine(options.device),
        "settings": {
            name: getattr(options, name) for name in ("tokens", "rounds", "least", "server", "note")
        },
    }
    for path in [options.path, *([options.against] if options.against else [])]:
        with _server(path, options) as (process, url, name):
            for length in options.prompt:
                prompts = _prompts(options, length)
                # kernels compile, memory is touched
                asyncio.run(_load(url, name, prompts[:1] * 2, 2, options.tokens))
                for at_once in options.at:
                    count = max(at_once * options.rounds, options.least)
                    asked = [prompts[turn % len(prompts)] for turn in range(count)]
                    began = time.perf_counter()
                    times = asyncio.run(_load(url, name, asked, at_once, options.tokens))
                    took = time.perf_counter() - began
                    rows.append(_row(path, length, at_once, times, took, options, url, process))
                    print(json.dumps(asdict(rows[-1])), flush=True)
                    found["rows"] = [asdict(row) for row in rows]
                    put(options.out, "server", found, _table(found, rows))
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", metavar="PATH", help="what `linearize serve` takes")
    parser.add_argument("--against", metavar="MODEL", help="the teacher, served the same way")
    parser.add_argument("--at", type=int, nargs="+", default=[1, 4, 16], metavar="N", help="requests at once")
    parser.add_argument("--prompt", type=int, nargs="+", default=[128], metavar="TOKENS")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="new ones of each request")
    parser.add_argument(
        "--rounds", type=int, default=2, metavar="N", help="requests for each that runs at once"
    )
    parser.add_argument("--least", type=int, default=4, metavar="N", help="requests at least")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--note", default="", help="a sentence for the page, such as what else the machine had to do"
    )
    parser.add_argument(
        "--server", default="", metavar="OPTIONS", help="further options of `linearize serve`"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/serve.json", metavar="FILE")
    return parser.parse_args(arguments)


@contextmanager
def _server(path: str, options: argparse.Namespace) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A server process; its address, and the model's name."""
    command = [sys.executable, "-m", "linearize", "serve", path, "--port", "0", "--engine", "slots"]
    command += ["--device", options.device, "--slots", str(max(options.at)), *shlex.split(options.server)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stderr is not None
    said = ""
    while not (found := re.search(r"serving '(.*)' on (http://\S+)/v1", said)):
        said = process.stderr.readline()
        if not said:
            raise SystemExit(f"{shlex.join(command)} ended with {process.wait()}")
        print(said, end="", file=sys.stderr)
    try:
        yield process, found[2], found[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    if process.returncode:
        raise SystemExit(f"the server ended with {process.returncode}")


def _prompts(options: argparse.Namespace, length: int) -> list[list[int]]:
    """Pieces of the packaged text of so many tokens, as ids of the conversion's tokenizer."""
    from linearize.cli.checkpoint import export_of

    tokenizer = models.load_tokenizer(models.resolve(export_of(options.path)))
    column = pyarrow.parquet.read_table(builtin.sample("validation")).column(builtin.COLUMN).to_pylist()
    ids = tokenizer("\n\n".join(column), verbose=False)["input_ids"]
    ids *= length // len(ids) + 2
    dice = random.Random(0)
    starts = (dice.randrange(len(ids) - length) for _ in range(64))
    return [ids[start : start + length] for start in starts]


async def _load(
    url: str, name: str, prompts: list[list[int]], at_once: int, tokens: int
) -> list[tuple[float, float]]:
    """Seconds until the first token and to the end, of each request; `at_once` of them run together."""
    key = os.environ.get("LINEARIZE_TOKEN") or "none"
    api = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=3600)
    turns, times = asyncio.Semaphore(at_once), []

    async def one(prompt: list[int]) -> None:
        async with turns:
            began, first = time.perf_counter(), 0.0
            stream = await api.completions.create(
                model=name, prompt=prompt, max_tokens=tokens, temperature=0, stream=True,
                stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
            )  # fmt: skip
            async for piece in stream:
                first = first or time.perf_counter() - began
                if piece.usage is not None:
                    assert piece.usage.completion_tokens == tokens, piece.usage
            times.append((first, time.perf_counter() - began))

    async with api:
        await asyncio.gather(*(one(prompt) for prompt in prompts))
    return times


def _row(
    path: str,
    prompt: int,
    at_once: int,
    times: list[tuple[float, float]],
    seconds: float,
    options: argparse.Namespace,
    url: str,
    process: subprocess.Popen[str],
) -> Row:
    count = len(times)
    request = urllib.request.Request(f"{url}/metrics")
    if os.environ.get("LINEARIZE_TOKEN"):
        request.add_header("Authorization", f"Bearer {os.environ['LINEARIZE_TOKEN']}")
    with urllib.request.urlopen(request) as answer:
        told = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#")
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    return Row(
        model=path,
        prompt=prompt,
        at_once=at_once,
        requests=count,
        seconds=round(seconds, 3),
        requests_per_second=round(count / seconds, 3),
        tokens_per_second=round(count * options.tokens / seconds, 2),
        first_token=round(statistics.median(first for first, _ in times), 3),
        request=round(statistics.median(whole for _, whole in times), 3),
        slot_mib=round(float(told["linearize_state_bytes"]) / float(told["linearize_slots"]) / 2**20, 2),
        peak_mib=round(int(peak[1]) / 1024) if peak else 0,
    )


def _table(found: dict[str, Any], rows: list[Row]) -> str:
    settings = found["settings"]
    lines = [
        "# `linearize serve`: requests/s and tokens/s",
        "",
        f"`{found['command']}`, {found['date']}, commit {found['commit']}, {found['machine']}. "
        f"{settings['note']} {settings['tokens']:,} new tokens each, streamed; the client is OpenAI's, on the same "
        "machine. Seconds are medians; tokens/s counts new tokens. Of a teacher, a slot holds keys and values "
        "of the longest text that the server takes; the peak is that of the process, with the weights.",
        "",
        "| model | prompt | at once | requests/s | tokens/s | first token, s | request, s | slot, MiB | peak, MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {Path(row.model).name} | {row.prompt:,} | {row.at_once} | {row.requests_per_second:.2f} "
            f"| {row.tokens_per_second:.1f} | {row.first_token:.2f} | {row.request:.2f} | {row.slot_mib:,.1f} "
            f"| {row.peak_mib:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def _machine(device: str) -> str:
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    names = re.findall(r"model name\s*: (.*)", _said("cat", "/proc/cpuinfo"))
    return (
        f"{os.cpu_count()} CPU cores ({names[0] if names else platform.machine()}), torch {torch.__version__}"
    )


def _said(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
