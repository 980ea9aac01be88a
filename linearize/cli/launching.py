"""`linearize launch PRESET MODEL RECIPE`: `linearize run` in several processes, by a preset of recipes/launch."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from linearize.cli.run import composed, default_folder
from linearize.config.budget import check
from linearize.config.compose import RECIPES
from linearize.errors import LinearizeError
from linearize.registry import closest

PRESETS = RECIPES / "launch"
QUEUE = "hydra-submitit-launcher"


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
    from omegaconf import OmegaConf

    known = OmegaConf.load(PRESETS / f"{name}.yaml")
    for text in given:
        key = text.partition("=")[0]
        if key not in known.keys():  # noqa: SIM118 (one that is missing is not in it)
            raise LaunchError(f"--set {text}: '{name}' has no {key}; {closest(key, [str(k) for k in known])}")
        if "=" not in text:
            raise LaunchError(f"--set {text}: must be KEY=VALUE, such as {key}=1")
    merged = OmegaConf.merge(known, OmegaConf.from_dotlist(given))
    for key in OmegaConf.missing_keys(merged):
        raise LaunchError(f"preset '{name}' needs {key}: add --set {key}=..., see {PRESETS / f'{name}.yaml'}")
    found: dict[str, Any] = OmegaConf.to_container(merged)  # type: ignore[assignment]
    return found


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
    processes = _cards() if processes == "auto" else processes
    for key, value in (("nodes", nodes), ("processes", processes)):
        if not isinstance(value, int) or value < 1:
            raise LaunchError(f"--set {key}={value}: must be a whole number from 1 on")
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
    import hydra

    if not _found("hydra_plugins.hydra_submitit_launcher"):
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


def _found(module: str) -> bool:
    import importlib.util

    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


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
