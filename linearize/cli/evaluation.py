"""`linearize eval PATH`: a suite of measurements of a model, its teacher and the controls, as rows and as a table."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from linearize.console import console, quiet_libraries
from linearize.errors import LinearizeError

log = logging.getLogger(__name__)


def main(options: argparse.Namespace) -> int:
    """Measure what is not there yet, print the tables, and leave every number in results.json."""
    from linearize.cli.checkpoint import export_of
    from linearize.distill import RunStopped
    from linearize.distill.lock import held
    from linearize.eval import suite, tasks_known
    from linearize.models import resolve
    from linearize.signals import exit_code

    quiet_libraries()
    _check(options)
    named_controls = options.control
    options.control = _with_trained_alike(options.path, options.control)
    given = [_name(source) for source in options.control]

    def faults(unit: suite.Unit) -> list[str]:
        return [*tasks_known.problems(unit), *suite.role_problems(unit, given)]

    suites = suite.load(named, options.only, faults) if (named := _without_tasks(options.suite)) else []
    if options.tasks:
        suites.append(_lm_tasks(options))
    elif named != options.suite:
        raise LinearizeError("--suite tasks: name them with --tasks A,B")
    if options.roles:
        suites = suite.of_roles(suites, _roles(options))
    if options.text and not any(tasks_known.TASKS[unit.task].reads for one in suites for unit in one.units):
        tasks = ", ".join(dict.fromkeys(unit.task for one in suites for unit in one.units))
        raise LinearizeError(
            f"--text: nothing that is measured reads it ({tasks}); leave it out, or measure text as well"
        )
    measured = [unit for one in suites for unit in one.units]
    for control in named_controls:
        if not any(unit.concerns(_name(control)) for unit in measured):
            raise LinearizeError(
                f"--control {control}: nothing is measured of it (--roles, or the suite's own roles, leave it out); "
                f"add '{_name(control)}' to them, or leave out the control"
            )
    against = options.against or _base(export_of(options.path))
    for source in [against, *options.control]:
        if source is not None:  # before the minutes that the model takes
            resolve(export_of(source))
    texts = _texts(options.text)
    out = options.out or _folder(options.path)
    with held(out):
        try:
            _judge(options, suites, against, texts, out, options.line)
        except KeyboardInterrupt as stop:
            raise RunStopped(
                f"stopped; what was measured is kept in {out}. The same command goes on:\n  {options.line}",
                exit_code(stop),
            ) from None
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse options that would change nothing."""
    if options.only and not _without_tasks(options.suite):
        raise LinearizeError("--only with --suite tasks: --tasks A,B says which; leave out --only")
    beside = {
        "--include-path": options.include_path is not None,
        "--task-data": options.task_data is not None,
        "--shots": options.shots is not None,
        "--limit": bool(options.limit),
    }
    if not options.tasks and any(beside.values()):
        name = next(name for name, given in beside.items() if given)
        raise LinearizeError(
            f"{name} without --tasks: it is about tasks of lm-eval; name them with --tasks A,B"
        )


def _judge(
    options: argparse.Namespace,
    suites: list[Any],
    against: str | None,
    texts: dict[str, list[Any]],
    out: Path,
    command: str,
) -> None:
    """Load, measure, print."""
    from linearize import surgery
    from linearize.cli import comparison, trained_alike
    from linearize.cli.checkpoint import load
    from linearize.decode.limits import learned_positions
    from linearize.distill.memory import watched
    from linearize.eval import page, side_by_side, summary
    from linearize.eval.cast import entrants
    from linearize.eval.causal import check_causal
    from linearize.eval.judge import judge
    from linearize.eval.measurement import Setting
    from linearize.eval.rows import Scores

    scores = Scores(out / "results.json")
    with watched(
        f"measuring {options.path}", lambda: "Take a smaller --suite, --only some of it, or --device cpu"
    ):
        student, tokenizer = load(options.path, options.device)
        check_causal(options.path, student)
        teacher = None
        if against is not None:
            teacher, other = load(against, options.device)
            _same_tokens(tokenizer, other, options.path, against)
            check_causal(against, teacher)
        elif surgery.converted(student):
            log.info(
                "%s does not say what it was converted from: no teacher, KL, untrained swap or swa_sinks; "
                "--against MODEL adds them",
                options.path,
            )
        setting = Setting(tokenizer, texts, out, seed=options.seed, autocast=_autocast(student))
        setting.device = next(student.parameters()).device.type
        limits = [
            limit for model in (student, teacher) if model is not None and (limit := learned_positions(model))
        ]
        setting.longest = min(limits, default=None)
        if setting.autocast is not None:
            setting.batch_tokens *= 16  # a GPU's batches
        cast = entrants(
            student,
            teacher,
            names=(_name(options.path), _name(against or "")),
            identities=(_identity(options.path), _identity(against) if against else None),
            others=[_control(source, options, tokenizer) for source in options.control],
            seed=options.seed,
        )
        empty = True
        for measured, rows in judge(suites, cast, setting, scores, command=command):
            empty = empty and not rows
            console().print(summary.tables(measured, rows, [entrant.role for entrant in cast]))
            written = side_by_side.samples(rows, out)
            if written is not None:
                console().print(written)
    if empty:
        raise LinearizeError(
            f"nothing of {', '.join(one.name for one in suites) or 'it'} could be measured of {options.path}, for the "
            "reasons above; take another --suite, or a longer --text"
        )
    console().print(f"scores  {scores.path}", markup=False, soft_wrap=True)
    subjects = page.read([scores.path])
    comparison.show(page.compose(subjects), out)
    run = trained_alike.run_of(options.path)
    if run is not None and against is not None and not options.control and surgery.converted(student):
        console().print()
        for line in trained_alike.advice(run, against):  # a command is one line, to be copied
            console().print(line, markup=False, soft_wrap=line.startswith(" "), highlight=False)


def _with_trained_alike(path: str, controls: list[str]) -> list[str]:
    """The named controls, and the teacher that was trained the same way, if it lies where a run has it."""
    from linearize.cli import trained_alike

    run = trained_alike.run_of(path)
    control = None if run is None else trained_alike.found(run)
    if control is None or Path(control).resolve() in [Path(source).resolve() for source in controls]:
        return controls
    log.info("%s: the teacher trained the same way without surgery, measured as well", control)
    return [*controls, control]


def _without_tasks(suites: list[str]) -> list[str]:
    return [name for name in suites if name != "tasks"]


def _roles(options: argparse.Namespace) -> list[str]:
    """Of --roles, all of them known."""
    from linearize.eval.cast import CONTROLS
    from linearize.eval.rows import STUDENT, TEACHER
    from linearize.eval.suite import GIVEN
    from linearize.registry import closest

    given = [_name(source) for source in options.control]
    known = [TEACHER, STUDENT, *CONTROLS, *given]
    roles = []
    for role in options.roles:
        if role == GIVEN and given:
            roles += given
        elif role in known:
            roles.append(role)
        else:
            raise LinearizeError(
                f"--roles: no role '{role}'; {closest(role, [*known, *([GIVEN] if given else [])])}"
            )
    return roles


def _lm_tasks(options: argparse.Namespace) -> Any:
    from linearize.eval import lm_tasks

    return lm_tasks.suite(
        options.tasks,
        shots=options.shots,
        limit=options.limit,
        include=options.include_path,
        data=options.task_data,
    )


def _name(path: str) -> str:
    """What the table calls the model: the run, also when its `checkpoint` folder was given."""
    folder = Path(path)
    return folder.parent.name if folder.name == "checkpoint" and folder.parent.name else folder.name


def _folder(path: str) -> Path:
    """Where the scores of a model go: into its run folder, or beside where it was started."""
    from linearize.cli.checkpoint import export_of

    run = Path(path).parent if Path(path).name == "checkpoint" else Path(path)
    is_run = (run / "recipe.yaml").is_file() and Path(export_of(str(run))) == run / "checkpoint"
    return run / "eval" if is_run else Path("runs") / f"eval-{_name(path)}"


def _base(folder: str) -> str | None:
    """The model that a checkpoint was converted from, where it says so and the model can be found."""
    from linearize.errors import CheckpointError, ModelNotFoundError
    from linearize.export import origin
    from linearize.models import resolve

    note = origin.read_note(Path(resolve(folder)))
    try:
        base = origin.found(note)
        if base is not None:
            resolve(base)
    except (CheckpointError, ModelNotFoundError) as error:
        raise LinearizeError(
            f"{folder} was converted from a model that is not here ({error}); name it with --against MODEL"
        ) from error
    return base


def _identity(path: str) -> dict[str, str]:
    from linearize.cli.checkpoint import export_of
    from linearize.distill.identity import fingerprint

    return fingerprint(export_of(path))


def _texts(named: list[tuple[str, str]]) -> dict[str, list[Any]]:
    """Name -> documents; the package's own held-out sample has no name."""
    from linearize import data
    from linearize.config import DataConfig

    sources = dict(named) or {"": "builtin"}
    if len(sources) < len(named):
        raise LinearizeError("--text: two texts have the same name; give each its own")
    return {
        name: list(data.validation_documents(DataConfig(validation=source)))
        for name, source in sources.items()
    }


def _same_tokens(tokenizer: Any, other: Any, path: str, against: str) -> None:
    """Scores of tokens compare only where the tokens are the same."""
    if other is not None and tokenizer.get_vocab() != other.get_vocab():
        raise LinearizeError(
            f"{against} has another tokenizer than {path}: their scores a token cannot be compared; give one of the "
            "same vocabulary"
        )


def _autocast(model: Any) -> Any:
    import torch

    # The precision that training used, see RunConfig.precision.
    return torch.bfloat16 if next(model.parameters()).device.type == "cuda" else None


def _control(source: str, options: argparse.Namespace, tokenizer: Any) -> Any:
    """A further checkpoint, loaded for as long as it is measured."""
    from linearize.cli.checkpoint import load
    from linearize.eval.cast import Entrant
    from linearize.eval.causal import check_causal

    @contextmanager
    def opened() -> Iterator[Any]:
        model, other = load(source, options.device)
        _same_tokens(tokenizer, other, options.path, source)
        check_causal(source, model)
        yield model

    return Entrant(_name(options.path), _name(source), _identity(source), opened)  # as every control is named
