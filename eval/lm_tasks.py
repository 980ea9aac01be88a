"""Any task of lm-eval as a measurement: names of the hub, YAML folders of one's own, the five local ones offline.

Beside each score stands what it is worth next to the teacher's: (score - chance) / (teacher's - chance), drawn over
the items that both answered. A student at 30 % of a four-choice task has kept 20 % of a teacher at 50 %, not 60 %.
"""

from __future__ import annotations

import copy
import json
import random
import re
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import yaml

from linearize.data.tokens import Tokens
from linearize.errors import LinearizeError, RecipeError
from linearize.eval import harness, task_files
from linearize.eval.intervals import DRAWS, bootstrap, wilson
from linearize.eval.lm_requests import Share, expected
from linearize.eval.measurement import Call, Setting, score
from linearize.eval.rows import TEACHER, Score, key_of
from linearize.eval.suite import Suite, Takes, Unit
from linearize.eval.task_groups import Folder
from linearize.models.boundary import boundary
from linearize.registry import closest
from linearize.storing import write_json
from linearize.version import __version__

TASK = "lm_eval"
SHARES = ("acc", "acc_norm", "exact_match", "em")
"""Metrics that are shares of right items, for which a relative score means something."""
TOKENS_A_ROW = 512
"""Sequences go through the model together as if each had so many tokens."""


def suite(
    names: Sequence[str], *, shots: int | None, limit: int, include: Path | None, data: Path | None
) -> Suite:
    """The tasks that a command line names, as a suite of its own.

    Args:
        names: tasks or groups of lm-eval; "all" stands for the five local ones.
        shots: worked examples; None takes what `shots.yaml` says, else the task's own number.
        limit: items of each task; 0 takes all.
        include: folder of further task YAMLs.
        data: folder of the five local tasks' JSONL files, which are then read from there.

    Raises:
        LinearizeError: lm-eval is missing, or has no such task; a group of the folder names one that there is not.
        DataError: a local file is missing or damaged.
    """
    harness.import_lm_eval()
    if include is not None:
        check_folder(include)
    published = yaml.safe_load(Path(__file__).with_name("shots.yaml").read_text(encoding="utf-8"))
    local = harness.task_names() if data is not None else []
    chosen = dict.fromkeys(one for name in names for one in (local if name == "all" else [name]))
    if "all" in names and data is None:
        raise LinearizeError(
            "--tasks all: needs --task-data DIR, the folder that holds the five tasks' JSONL files"
        )
    units = []
    if include is not None:
        folder = Folder(include, _manager(include).task_index)
        problems = [problem for name in chosen if name not in local for problem in folder.problems(name)]
        if problems:
            raise RecipeError(list(dict.fromkeys(problems)), "--include-path")
    for name in chosen:
        if name not in local and name not in known(include):
            hint = closest(name, [*known(include), *local])
            hint = hint if hint.startswith("did you mean") else HINT  # not the names of all thousands
            raise LinearizeError(f"--tasks: lm-eval has no task '{name}'; {hint}")
        found = published.get(name) if shots is None else shots
        settings: dict[str, Any] = {
            "name": name,
            "shots": found,
            "limit": limit,
            "include": None if include is None else str(include),
            "data": str(data) if name in local else None,
        }
        if name in local:
            settings["read"] = task_files.of_items([name], data or "", limit)[name]
        elif include is not None:
            settings["read"] = task_files.of_folder(include)
        units.append(Unit(TASK, 0, settings))
    elsewhere = [name for name in chosen if name not in local]
    if data is not None and elsewhere == list(chosen):
        raise LinearizeError(
            f"--task-data: {', '.join(elsewhere)}: not read from there, as the five local tasks are "
            f"({', '.join(local)}); leave it out, or name some of those"
        )
    if include is not None and not elsewhere:
        raise LinearizeError(
            f"--include-path: {', '.join(chosen)}: read from --task-data, and no task of that folder is named; "
            "leave it out, or name one"
        )
    return Suite("tasks", "tasks of lm-eval", tuple(units))


def check_folder(include: Path) -> None:
    """Refuse a folder of tasks that is none, or holds a file that is no YAML: lm-eval passes over both in silence.

    Raises:
        LinearizeError: naming the file and the line.
    """
    if not include.is_dir():
        raise LinearizeError(f"--include-path: no folder '{include}'; give the one that holds the task YAMLs")
    for file in sorted(include.rglob("*.yaml")):
        try:
            yaml.compose(file.read_text(encoding="utf-8"))  # its tags (!function) are lm-eval's to understand
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            where = f" ({' '.join(str(error).split())[:200]})"
            raise LinearizeError(
                f"--include-path: {file} is no YAML{where}; mend it or take it out"
            ) from error


HINT = "`lm_eval ls tasks` lists them; --include-path DIR adds a folder of your own"


@cache
def _manager(include: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    with boundary(
        f"--include-path {include}", "look at its YAML files", verb="cannot be read", kind=LinearizeError
    ):
        return TaskManager(include_path=None if include is None else str(include))


def known(include: Path | None) -> set[str]:
    """Names of all tasks, groups and tags."""
    return set(_manager(include).all_tasks)


class LmTasks:
    """One task or group of lm-eval. Its settings are those of `suite`, which checks them."""

    reads: ClassVar = False
    compares: ClassVar = True
    takes: ClassVar[dict[str, Takes]] = {}

    def room(self, unit: Unit) -> int:
        """The harness cuts what is too long itself."""
        return 0

    def units(self, unit: Unit, setting: Setting) -> Sequence[Unit]:
        """The unit itself."""
        return [unit]

    def tokens(self, unit: Unit, setting: Setting) -> int:
        """Of all items, as the first ones' requests are; loads the data."""
        return setting.once(("lm-eval", key_of(unit.settings)), lambda: estimate(setting, unit.settings))

    def measure(self, model: Any, call: Call, setting: Setting, meter: Any) -> list[Score]:
        """Every metric with its interval, and relative to the teacher's."""
        share = Share(meter, self.tokens(call.unit, setting))
        results = evaluate(model, setting, call.unit.settings, share)
        name, shots = call.unit.settings["name"], call.unit.settings["shots"]
        found = Items.of(results, name)
        folder = setting.folder / "items"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{call.key}.json", found.to_dict())
        import lm_eval

        title = name if shots is None else f"{name} ({shots}-shot)"
        version = f"linearize {__version__}, lm-eval {lm_eval.__version__}"
        made = list(_scores(results["results"][name], found, setting.seed))
        if call.entrant.role != TEACHER:
            teacher = Items.read(folder / f"{setting.key_of(TEACHER, call.unit)}.json")
            made += [] if teacher is None else _relative(found, teacher, setting.seed)
        return [replace(row, task=title, version=version) for row in made]


class Items:
    """What each item scored: metric -> values, and what guessing would have scored."""

    def __init__(self, values: dict[str, list[float]], chance: list[float]) -> None:
        self.values = values
        self.chance = chance

    @classmethod
    def of(cls, results: Mapping[str, Any], name: str) -> Items:
        """From lm-eval's samples of a task, or of all tasks of a group."""
        values: dict[str, list[float]] = {}
        chance: dict[str, list[float]] = {}
        for task in _leaves(results, name):
            choice = results["configs"][task].get("output_type") == "multiple_choice"
            for sample in results["samples"].get(task, ()):
                for metric in sample.get("metrics", ()):
                    if isinstance(sample.get(metric), int | float):
                        values.setdefault(_named(metric, sample.get("filter")), []).append(
                            float(sample[metric])
                        )
                        guess = 1 / max(1, len(sample["filtered_resps"])) if choice else 0.0
                        chance.setdefault(_named(metric, sample.get("filter")), []).append(guess)
        return cls(values, next(iter(chance.values()), []))

    @classmethod
    def read(cls, path: Path) -> Items | None:
        """What another model's measurement left, if it did."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(dict(found["values"]), list(found["chance"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"values": self.values, "chance": self.chance}


def evaluate(
    model: Any, setting: Setting, settings: Mapping[str, Any], share: Share | None = None
) -> dict[str, Any]:
    """lm-eval's results with samples; neither the model, nor the tokenizer, nor any random generator is changed.

    Raises:
        LinearizeError: the data cannot be had, or the harness refuses the task.
    """
    lm_eval = harness.import_lm_eval()
    with _reading(settings) as task:
        wrapped = harness.language_model()(
            pretrained=model,
            tokenizer=copy.deepcopy(setting.tokenizer),
            batch_size=settings.get("batch_size") or _rows(setting),
            mixed_precision_dtype=setting.autocast,
            softmax_dtype=torch.float32,
        )
        wrapped.share = share
        wrapped.encode = Tokens(wrapped.tokenizer)
        found: dict[str, Any] = lm_eval.simple_evaluate(
            wrapped,
            tasks=[task],
            num_fewshot=settings.get("shots"),
            task_manager=_own_manager(settings),
            limit=settings["limit"] or None,
            bootstrap_iters=0,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
            fewshot_random_seed=SHOTS_SEED,
        )
        return found


def estimate(setting: Setting, settings: Mapping[str, Any]) -> int:
    """Tokens that a task will put through each model. Raises as `evaluate`."""
    harness.import_lm_eval()
    with _reading(settings) as task:
        tasks = _own_manager(settings).load([task])["tasks"]
        for one in tasks.values():  # as lm-eval itself does it
            shots = one.get_config("num_fewshot")
            if shots is None or (settings.get("shots") is not None and shots != 0):
                one.set_config(key="num_fewshot", value=settings.get("shots") or 0)
            one.set_fewshot_seed(seed=SHOTS_SEED)
        most = setting.longest or 2**31
        return expected(
            tasks, Tokens(setting.tokenizer), limit=settings["limit"], most=most, rows=_rows(setting), step=setting.step
        )  # fmt: skip


@contextmanager
def _reading(settings: Mapping[str, Any]) -> Iterator[Any]:
    """The task as lm-eval takes it, while its data is read: quietly, and what fails with a remedy."""
    name, data = settings["name"], settings["data"]
    own = _own(name, settings.get("include"))
    away = None if data is not None or own is not None else hub_away()
    remedy = REMEDY if own is None else f"look at {own} and at the data that it names, {OR_AWAY}"
    if away is not None:
        remedy = f"the Hugging Face hub cannot be reached ({away}). {AWAY}"
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        stack.enter_context(harness.quiet(offline=data is not None or away is not None))
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="linearize-tasks-"))
        stack.enter_context(
            boundary(f"lm-eval's task '{name}'", remedy, verb="cannot be measured", kind=LinearizeError)
        )
        yield name if data is None else harness.inline(name, Path(data).expanduser(), scratch)


def _own_manager(settings: Mapping[str, Any]) -> Any:
    include = settings.get("include")
    return _manager(None if include is None else Path(include))


def _rows(setting: Setting) -> int:
    return max(1, setting.batch_tokens // TOKENS_A_ROW)


SHOTS_SEED = 1234
"""What draws the worked examples, as lm-eval's own command line has it."""
OR_AWAY = "or whether the hub can be reached where the data is there, or leave it out"
REMEDY = "look whether its data is here or the hub can be reached, or leave it out"
AWAY = (
    "Where it can be, the same command loads the data once, and later calls need no network; or name files of the same "
    "form in a YAML of five lines (--include-path DIR, docs/evaluation.md), or --task-data DIR for the five local tasks"
)
PATIENCE = 10.0
"""Seconds to wait for the hub: what loads data asks five times for each file of each subject, minutes in all."""


def _own(name: str, include: str | None) -> Path | None:
    """The YAML of the user's folder that a task or group stands in; it asks the hub or does not as it likes."""
    files = [] if include is None else sorted(Path(include).rglob("*.yaml"))
    own = re.compile(rf"^(task|group|tag):\s*['\"]?{re.escape(name)}['\"]?\s*$", re.MULTILINE)
    return next((file for file in files if own.search(file.read_text(encoding="utf-8"))), None)


@cache
def hub_away() -> str | None:
    """Why the Hugging Face hub cannot be reached, or None where it can; asked once."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=PATIENCE).close()
    except urllib.error.HTTPError:  # an answer, whichever
        return None
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return None


def _leaves(results: Mapping[str, Any], name: str) -> Iterator[str]:
    """The tasks under a group; a task is its own."""
    under = [task for task in results.get("group_subtasks", {}).get(name, ()) if task != name]
    if not under:
        yield name
    for task in under:
        yield from _leaves(results, task)


def _named(metric: str, filtered: str | None) -> str:
    return metric if filtered in (None, "none") else f"{metric}, {filtered}"


def _scores(found: Mapping[str, Any], items: Items, seed: int) -> Iterator[Score]:
    for key, value in found.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        name = _named(metric, filtered)
        values = items.values.get(name, [])
        interval: tuple[float | None, float | None] = (None, None)
        # a perplexity is no mean of its items' scores
        if values and abs(float(np.mean(values)) - value) < 1e-6:
            if set(values) <= {0.0, 1.0}:
                interval = wilson(sum(values), len(values))
            else:
                interval = bootstrap(values, np.ones(len(values)), seed)[1:]
        yield score(name, float(value), interval, len(values) or len(items.chance))


def _relative(own: Items, teacher: Items, seed: int) -> list[Score]:
    """(score - chance) / (teacher's - chance) with items drawn again, the same for both."""
    made = []
    for metric, values in own.values.items():
        theirs = teacher.values.get(metric, [])
        if metric.split(",")[0] not in SHARES or len(theirs) != len(values):
            continue
        rows = np.array([values, theirs, own.chance])
        gained, expected = rows[0].mean() - rows[2].mean(), rows[1].mean() - rows[2].mean()
        if expected <= 0:
            continue  # the teacher guesses: nothing was there to keep
        drawn = np.random.default_rng(seed).integers(len(values), size=(DRAWS, len(values)))
        means = rows[:, drawn].mean(2)
        ratios = (means[0] - means[2]) / np.where(means[1] > means[2], means[1] - means[2], np.nan)
        low, high = np.nanquantile(ratios, [0.025, 0.975])
        made.append(
            score("relative", float(gained / expected), (float(low), float(high)), len(values),
                  by="metric", bucket=metric, against=TEACHER)
        )  # fmt: skip
    return made
