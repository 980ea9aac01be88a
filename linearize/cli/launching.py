"""`linearize launch PRESET MODEL RECIPE`: `linearize run` in several processes, by a preset of recipes/launch."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from linearize.cli.run import composed, default_folder
from linearize.config import overrides
from linearize.config.budget import check
from linearize.config.compose import RECIPES
from linearize.config.literal import MISSING, without_foreign
from linearize.config.ranges import at_least
from linearize.config.values import shown
from linearize.errors import LinearizeError
from linearize.registry import closest

PRESETS = RECIPES / "launch"
QUEUE = "hydra-submitit-launcher"
COUNTS = {
    "nodes": at_least(1, 65_536),
    "processes": at_least(1, 1024),
    "seconds_to_stop": at_least(0, 86_400),
}
"""Fields of the presets that are numbers, and where they lie."""


class LaunchError(LinearizeError):
    """A preset that does not exist, or that cannot be used like this."""


def main(options: argparse.Namespace) -> int:
    """Hold the recipe against its rules, then start torchrun here, or put it into a queue; gives its exit code."""
    recipe = composed(options)
    if options.budget is not None:
        check(recipe, options.budget)
    run = [options.model, options.recipe, *options.overrides]
    run += ["--budget", options.budget.text] if options.budget is not None else []
    run += ["--out", str(options.out or default_folder(options.model, options.recipe))]
    if _queues(options.preset):
        # a job that is queued again goes on
        return _queued(options.preset, [*run, "--resume"], options.set, dry=options.dry_run)
    settings = preset(options.preset, options.set)
    command = torchrun(settings, run + ["--resume"] * options.resume, str(settings.get("endpoint", "")))
    if options.dry_run:
        sys.stdout.write(f"{shlex.join(command)}\n")
        return 0
    return _run(command, settings)


def names() -> list[str]:
    """Of the presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _queues(name: str) -> bool:
    if name not in names():
        raise LaunchError(f"unknown preset '{name}': {closest(name, names())}")
    return "hydra/launcher" in (PRESETS / f"{name}.yaml").read_text(encoding="utf-8")


def preset(name: str, given: list[str]) -> dict[str, Any]:
    """A preset that starts processes here, with what is given in the place of its own.

    Args:
        name: of the preset.
        given: key=value.

    Raises:
        LaunchError: no such key, or one that has to be given is missing.
    """
    known: dict[str, Any] = yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))
    found = dict(known)
    for text in given:
        key = text.partition("=")[0]
        if "=" not in text or key not in known:
            raise LaunchError(f"--set {text}: must be KEY=VALUE; {closest(key, known)}")
        changes, problems = overrides.parse([text])
        for change in changes:
            found[key] = without_foreign(change.value, f"--set {key}", problems)
        if problems:
            raise LaunchError("; ".join(problems))
    for key, value in found.items():
        if value == MISSING:
            raise LaunchError(
                f"preset '{name}' needs {key}: add --set {key}=..., see {PRESETS / f'{name}.yaml'}"
            )
        _check(key, value)
    if found["nodes"] > 1 and "endpoint" not in found:
        raise LaunchError(
            f"--set nodes={found['nodes']}: preset '{name}' is for one machine; `linearize launch nodes` is for several"
        )
    return found


def _check(key: str, value: Any) -> None:
    """Refuse what a field of a preset cannot be.

    Raises:
        LaunchError: naming the field, its value and the rule.
    """
    problem: str | None
    if key in COUNTS:
        problem = "must be a whole number" if type(value) is not int else COUNTS[key].problem(value)
        if key == "processes":
            problem = None if value == "auto" else problem and f"{problem}, or auto"
    elif key == "endpoint":
        fits = isinstance(value, str) and re.fullmatch(r"\S+:[0-9]{1,5}", value)
        problem = None if fits else "must be HOST:PORT, such as node1:29500"
    else:
        problem = None if isinstance(value, (str, int)) and str(value).strip() else "must be a name"
    if problem:
        raise LaunchError(f"--set {key}={shown(value)}: {problem}")


def torchrun(settings: Any, run: list[str], endpoint: str) -> list[str]:
    """The command of one machine.

    Args:
        settings: nodes, processes, and id where machines meet.
        run: arguments of `linearize run`.
        endpoint: host:port where they meet; of one machine none is needed.

    Raises:
        LaunchError: a number that is none.
    """
    nodes, processes = settings["nodes"], settings["processes"]
    for key, value in (("nodes", nodes), ("processes", processes)):
        _check(key, value)
    processes = _cards() if processes == "auto" else processes
    found = [sys.executable, "-m", "linearize.cli.torchrun", "--nproc-per-node", str(processes)]
    if nodes == 1:
        found += ["--standalone"]
    else:
        meet = [
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            endpoint,
            "--rdzv-id",
            str(settings.get("id", 0)),
        ]
        found += ["--nnodes", str(nodes), *meet]
    return [*found, "-m", "linearize", "run", *run]


def _cards() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    except OSError:
        return 1
    return max(1, len(listed.stdout.splitlines()))


def _run(command: list[str], settings: Any) -> int:
    """Start it and wait; what this process is asked for goes to all of them. Gives its exit code."""
    patience = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(settings["seconds_to_stop"])}
    ours = [signal.SIGINT, signal.SIGTERM]
    # the queue's own signal ends whoever does not know it
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    process = subprocess.Popen(command, env={**os.environ, **patience})
    signal.signal(signal.SIGUSR2, before)
    # Ctrl-C of a terminal has reached torchrun already
    handlers = [signal.signal(ours[0], signal.SIG_IGN)]
    handlers.append(signal.signal(ours[1], lambda *_: process.terminate()))
    try:
        return process.wait()
    finally:
        for number, handler in zip(ours, handlers, strict=True):
            signal.signal(number, handler)


# By a queue


def _queued(name: str, run: list[str], given: list[str], *, dry: bool) -> int:
    import importlib.util

    import hydra

    # of one plugin the folder of all is only there where another is
    folder = importlib.util.find_spec("hydra_plugins")
    if folder is None or importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        raise LaunchError(f"preset '{name}' needs {QUEUE}: pip install {QUEUE}")
    # in hexadecimal digits, which hydra's grammar leaves alone
    line = f"line=x{json.dumps(run).encode().hex()}"
    how = ["--cfg", "all", "--package", "hydra.launcher"] if dry else ["--multirun"]
    before, sys.argv = sys.argv, ["linearize", *how, line, *given]
    try:
        hydra.main(config_path=str(PRESETS), config_name=name, version_base=None)(task)()
    finally:
        sys.argv = before
    return 0


def task(config: Any) -> None:
    """On each machine of the job.

    Args:
        config: of the preset.

    Raises:
        RuntimeError: the run failed; submitit keeps what it said.
    """
    import submitit

    first = submitit.JobEnvironment().hostnames[0]
    run = json.loads(bytes.fromhex(config.line[1:]))
    os.chdir(os.environ.get("SLURM_SUBMIT_DIR", Path.cwd()))
    code = _run(torchrun(config, run, f"{first}:{config.port}"), config)
    if code:
        raise RuntimeError(f"linearize run ended with code {code}")
