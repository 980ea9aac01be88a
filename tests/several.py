"""Several processes as a launcher starts them, on one core: forked from a server that has imported everything once."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize import distill, launched
from linearize.errors import LinearizeError

PATIENCE = int(os.environ.get("LINEARIZE_TEST_PATIENCE", "400"))
"""Seconds after which processes that still run count as hanging; each says where, some time before."""

server = multiprocessing.get_context(os.environ.get("LINEARIZE_TEST_START", "forkserver"))


@dataclass(frozen=True)
class Ended:
    """How the processes ended: exit codes by rank, and what all of them said on standard error, in seconds."""

    codes: list[int | None]
    said: str
    seconds: float


def start(size: int, job: Callable[..., Any], *given: Any, folder: Path) -> Ended:
    """Run `job` in that many processes, as `linearize run` would be: errors become messages and codes.

    Args:
        size: processes.
        job: of a module that can be imported.
        given: its arguments.
        folder: for what they say.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # the server imports these once; it looks at the environment alone for where they are
    tests = Path(__file__).parent
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (tests, tests.parent)))
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["several", "several_jobs", "shard_jobs", "spread_jobs", "elsewhere"]
    )
    port = _free_port()
    environments = [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        if size > 1
        else {}
        for rank in range(size)
    ]
    paths = [folder / f"said-{rank}.txt" for rank in range(size)]
    began = time.monotonic()
    started = [
        server.Process(target=_one, args=(environment, path, job, given))
        for environment, path in zip(environments, paths, strict=True)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(max(0.1, PATIENCE + began - time.monotonic()))
    hanging = [rank for rank, process in enumerate(started) if process.is_alive()]
    for process in started:
        process.kill()
    said = "".join(path.read_text() for path in paths if path.exists())
    assert not hanging, f"processes {hanging} hang after {PATIENCE} seconds:\n{said}"
    return Ended([process.exitcode for process in started], said, time.monotonic() - began)


def _free_port() -> int:
    """A port that nobody listens on, and that the system gives to nobody who asks for any, as gloo's sockets do."""
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    least = int(given.read_text().split()[0]) if given.exists() else 32768
    drawn = random.SystemRandom()
    while True:
        port = drawn.randrange(min(10_000, least // 2), least)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def _one(environment: dict[str, str], path: Path, job: Callable[..., Any], given: tuple[Any, ...]) -> None:
    import torch

    gc.freeze()  # what the server has imported, which every training's collection would go through
    os.environ.update(environment)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with path.open("w", buffering=1) as sys.stderr:
        faulthandler.dump_traceback_later(0.7 * PATIENCE, file=sys.stderr)
        try:
            job(*given)
            code = 0
        except LinearizeError as error:
            code = error.exit_code
            if launched.shows_errors():
                print(error, file=sys.stderr)
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            traceback.print_exc()
            code = 1
    os._exit(code)


def whole(model: str, recipe: Any, out: Path) -> None:
    """One conversion, with its export and its report."""
    from linearize.export import reloading, verify

    verify.in_new_process = lambda settings, work: reloading.compare(settings, package=True)  # type: ignore[assignment]
    distill.run(model, recipe, out)


def run(model: str, recipe: Any, out: Path, resume: bool = False) -> None:
    """One conversion without them."""
    from linearize.distill import runner

    for module in (runner.exporting, runner.gathering):
        module.checkpoint = lambda model, tokenizer, recipe, folder, **_: folder.checkpoint
    runner.write_report = lambda folder: folder  # type: ignore[assignment]
    distill.run(model, recipe, out, resume=resume)


def lines(out: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
