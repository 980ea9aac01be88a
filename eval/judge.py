"""Suites on a cast of models: what is there already is not measured again, and every measurement is kept at once."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from linearize.decode.limits import learned_positions
from linearize.errors import DataError
from linearize.eval.cast import Entrant
from linearize.eval.efficiency import crossovers
from linearize.eval.lm_tasks import TASK
from linearize.eval.measurement import Call, Measurement, Setting
from linearize.eval.rows import STUDENT, TEACHER, Score, Scores, key_of
from linearize.eval.suite import Suite, Unit
from linearize.eval.tasks_known import TASKS
from linearize.eval.token_scores import Predictor
from linearize.mixers.offloaded import device_of
from linearize.progress import Meter, duration
from linearize.version import __version__

log = logging.getLogger(__name__)

PROBE = 256
"""Tokens of a sequence of the pass that measures how fast a model runs here."""
GPU_ROWS = 8
"""Such sequences on a GPU, which does eight in hardly more time than one."""


@dataclass(frozen=True)
class _Job:
    """One measurement to make."""

    call: Call
    tokens: int


def judge(
    suites: Sequence[Suite], cast: Sequence[Entrant], setting: Setting, scores: Scores, *, command: str
) -> Iterator[tuple[Suite, list[Score]]]:
    """Measure the suites one after the other.

    Args:
        suites: from `suite.load`.
        cast: from `cast.entrants`.
        setting: what the measurements share.
        scores: where rows go, and where those of earlier calls are.
        command: the command line, for the rows.

    Yields:
        Each suite with its rows, old and new, in the order of suite and cast.
    """
    by_role = {entrant.role: entrant for entrant in cast}

    def key(entrant: Entrant, unit: Unit) -> str:
        compared = _compared(entrant.role) if TASKS[unit.task].compares else ()
        beside = [by_role[role].identity for role in compared if role in by_role]
        return _key(entrant, beside, unit, setting)

    setting.key_of = lambda role, unit: key(by_role[role], unit) if role in by_role else ""
    _load_data(suites, cast, setting, scores)
    for suite in suites:
        units = list(_units(suite, setting, by_role))
        jobs = {entrant.role: _jobs(entrant, units, setting, scores) for entrant in cast}
        with ExitStack() as stack:
            if any(jobs.values()):
                _announce(suite, jobs, by_role, setting.autocast)
                if TEACHER in by_role and setting.teacher is None:
                    model = stack.enter_context(by_role[TEACHER].open())
                    setting.teacher = Predictor(model, setting.autocast)
            for number, entrant in enumerate(cast, 1):
                title = f"{suite.name} {number}/{len(cast)} {entrant.role}"
                _measure(suite, entrant, jobs[entrant.role], setting, scores, command, title)
        keys = dict.fromkeys(key(entrant, unit) for unit in units for entrant in cast)
        rows = [row for one in keys for row in scores.of(one)]
        derived = crossovers(rows)
        scores.add([row for row in derived if not scores.of(row.key)])
        yield suite, [*rows, *derived]


def _load_data(suites: Sequence[Suite], cast: Sequence[Entrant], setting: Setting, scores: Scores) -> None:
    """Data of lm-eval's tasks, where something is left to measure: what cannot be had ends the call now, and not behind
    the minutes that another suite takes."""
    for unit in (unit for suite in suites for unit in suite.units if unit.task == TASK):
        asked = [entrant.role for entrant in cast if unit.concerns(entrant.role)]
        if not all(scores.of(setting.key_of(role, unit)) for role in asked):
            TASKS[TASK].tokens(unit, setting)


def _units(suite: Suite, setting: Setting, roles: Collection[str]) -> Iterator[Unit]:
    """Those that can be measured; the others with a word."""
    for unit in suite.units:
        most = math.inf if setting.longest is None else setting.longest
        if unit.length + TASKS[unit.task].room(unit) > most:
            log.info(
                "%s: no %s at %d tokens: the model has %d positions", suite.name, unit.task, unit.length, most
            )
            continue
        if unit.roles and not any(unit.concerns(role) for role in roles):
            log.info(
                "%s: no %s: none of its roles is here (%s)", suite.name, unit.task, ", ".join(unit.roles)
            )
            continue
        try:
            made = TASKS[unit.task].units(unit, setting)
        except DataError as error:
            log.info("%s: no %s at %d tokens: %s", suite.name, unit.task, unit.length, error)
            continue
        for one in made:
            try:
                if TASKS[one.task].reads:  # of several texts one may be too short
                    TASKS[one.task].tokens(one, setting)
            except DataError as error:
                text = f" of '{name}'" if (name := one.settings.get("text")) else ""
                log.info("%s: no %s%s at %d tokens: %s", suite.name, one.task, text, one.length, error)
                continue
            yield one


def _compared(role: str) -> tuple[str, ...]:
    """Whose scores stand in a role's rows, as KL and differences: with another teacher they are other rows."""
    return () if role == TEACHER else (TEACHER,) if role == STUDENT else (TEACHER, STUDENT)


def _key(entrant: Entrant, beside: Sequence[Any], unit: Unit, setting: Setting) -> str:
    text = unit.settings.get("text")
    about = None if text is None else setting.digest(text)
    revision = getattr(TASKS[unit.task], "revision", 0)
    return key_of(
        entrant.identity, beside, entrant.role, unit.task, unit.length, unit.settings, setting.seed,
        __version__, str(setting.autocast), about, *([revision] if revision else []),
    )  # fmt: skip


def _jobs(entrant: Entrant, units: Sequence[Unit], setting: Setting, scores: Scores) -> list[_Job]:
    made: dict[
        str, _Job
    ] = {}  # of two units that differ in their roles alone, a role that both have is measured once
    for unit in units:
        key = setting.key_of(entrant.role, unit)
        if unit.concerns(entrant.role) and key not in made and not scores.of(key):
            made[key] = _Job(Call(unit, entrant, key), TASKS[unit.task].tokens(unit, setting))
    return list(made.values())


def _announce(
    suite: Suite,
    jobs: Mapping[str, Sequence[_Job]],
    cast: Mapping[str, Entrant],
    autocast: torch.dtype | None,
) -> None:
    """Say what the suite will take: tokens over the speed that a short pass had on this machine."""
    rates: dict[str, float] = {}
    for role in (TEACHER, STUDENT):
        if role in cast and any(jobs.values()):
            with cast[role].open() as model:
                rates[role] = speed(model, autocast)
    seconds = 0.0
    for role, todo in jobs.items():
        rate = rates[TEACHER] if role == TEACHER else rates[STUDENT]
        seconds += sum(job.tokens for job in todo) / rate
    models = sum(bool(todo) for todo in jobs.values())
    about = f"{suite.about}; {models} model{'s' if models != 1 else ''}"
    log.info("%s (%s): about %s on this machine", suite.name, about, duration(seconds))


def speed(model: Any, autocast: torch.dtype | None = None) -> float:
    """Tokens a second of a short pass, after one that warms up and compiles."""
    device = device_of(model)
    tokens = min(PROBE, learned_positions(model) or PROBE)
    rows = GPU_ROWS if device.type == "cuda" else 1
    ids = torch.arange(tokens, device=device) % model.get_input_embeddings().weight.shape[0]
    ids = ids.expand(rows, -1)
    seconds = 0.0
    with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        for _ in range(2):
            _wait(device)
            started = time.monotonic()
            model(input_ids=ids, use_cache=False)
            _wait(device)
            seconds = time.monotonic() - started
    return rows * tokens / max(seconds, 1e-6)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measure(
    suite: Suite,
    entrant: Entrant,
    jobs: Sequence[_Job],
    setting: Setting,
    scores: Scores,
    command: str,
    title: str,
) -> None:
    if not jobs:
        return
    with entrant.open() as model, Meter(title, sum(job.tokens for job in jobs)) as meter:
        model.eval()
        for job in jobs:
            task = TASKS[job.call.unit.task]
            done = meter.done
            rows = task.measure(model, job.call, setting, meter)
            meter.advance(done + job.tokens - meter.done)
            scores.add([_signed(row, suite, job, setting, command) for row in rows])


def _signed(row: Score, suite: Suite, job: _Job, setting: Setting, command: str) -> Score:
    unit, entrant = job.call.unit, job.call.entrant
    text = unit.settings.get("text", "")
    return replace(
        row,
        model=entrant.name,
        role=entrant.role,
        suite=suite.name,
        task=row.task or (f"{unit.task}: {text}" if text else unit.task),
        length=row.length if row.length is not None else unit.length or None,
        seed=setting.seed,
        version=row.version or f"linearize {__version__}",
        command=command,
        key=job.call.key,
    )


__all__ = ["Measurement", "judge", "speed"]
