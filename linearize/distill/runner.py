"""The main job: teacher, surgery, stages, exported checkpoint; measured on the way, resumable anywhere."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from linearize import launched, models, objectives, surgery
from linearize.config.budget import Budget
from linearize.config.budget import check as check_budget
from linearize.config.schema import Recipe
from linearize.distill import (
    batches,
    budgeting,
    calibrate,
    exporting,
    gathering,
    memory,
    processes,
    rates,
    sequences,
    shards,
    stages,
    teachers,
    texts,
    tracking,
)
from linearize.distill.callbacks import RunStopped
from linearize.distill.device import resolved
from linearize.distill.folder import TEXTS, RunFolder, facts, plan_json
from linearize.distill.lock import held
from linearize.distill.placing import Place
from linearize.distill.planned import planned
from linearize.distill.processes import ProcessLost, alone
from linearize.distill.results import Measurer, Results
from linearize.distill.stages import StagePlace
from linearize.distill.summary import RunSummary
from linearize.distill.tracking import Trackers
from linearize.errors import LinearizeError, RecipeError, UnsupportedModelError, collected, raise_together
from linearize.eval.report import write_report
from linearize.models.sound import check_trainable
from linearize.signals import exit_code
from linearize.storing import write_json, writing
from linearize.surgery.inspection import skeleton

log = logging.getLogger(__name__)

_FEWER_TOKENS = "a smaller token budget (stages.*.tokens) in a new run folder"
_SMALLER_MODEL = "a smaller model, or run.device=cpu where the machine has more memory than the device"


def run(
    model: str,
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    recipe_name: str = "",
    budget: Budget | None = None,
) -> RunSummary:
    """Convert a model by a recipe: train, measure, export and report.

    Args:
        model: hub id, checkpoint folder, GGUF file or alias.
        recipe: composed by `config.compose`.
        out: the run folder.
        resume: go on with the run in `out`, from its newest intact checkpoint; starts one when there is none. The
            recipe may differ in what does not change the result; `distill.continuing` lists that.
        recipe_name: what the user called the recipe, for the report.
        budget: what the training of all stages may take, in time or tokens: the recipe is scaled to it, and the folder
            holds the scaled one. A time is measured first, and not again where a run goes on.

    Raises:
        RecipeError: the budget is too small.
        RunFolderError: `out` is in use by another process, or holds another run.
        ModelNotFoundError, UnsupportedModelError, DataError: before anything is written.
        RunStopped: stopped on request; the message holds the command that goes on.
        NotFiniteError: the teacher, or what a stage has made of it, gives NaN for a text.
        NonFiniteLossError, CheckpointError: training or writing failed; what was saved before is intact.
        OutOfMemoryError: the message holds the command that goes on with less.
    """
    if budget is not None:
        check_budget(recipe, budget)
    folder = RunFolder(Path(out))
    job = _Job(model, recipe, folder, recipe_name or recipe.description)
    with ExitStack() as stack:
        try:
            stack.enter_context(processes.joined(job.device, job.lost))
            processes.alone(folder.look)
            processes.alone(lambda: stack.enter_context(held(folder.path)))
            stack.enter_context(writing(folder.path))
            if launched.first():
                stack.callback(lambda: folder.sweep(list(recipe.stages)))
            with processes.passing():
                return job.run(resume=resume, budget=budget, stack=stack)
        except KeyboardInterrupt as stop:
            if not folder.recipe.is_file():
                raise
            raise RunStopped(
                f"aborted; what was saved before is intact. Go on with:\n  {job.resume_command}",
                exit_code(stop),
            ) from None
        except ProcessLost as lost:
            raise job.lost(lost) from lost


class _Job:
    """One call of `run`."""

    def __init__(self, model: str, recipe: Recipe, folder: RunFolder, recipe_name: str) -> None:
        self.source = model
        self.recipe = recipe
        self.texts = recipe
        """The recipe with files for what the teacher is to write."""
        self.folder = folder
        self.recipe_name = recipe_name
        self.wrong: list[LinearizeError] = []
        self.device, self.autocast, self.weights = resolved(recipe.run, self.wrong)
        out = shlex.quote(str(folder.path))
        # The folder's own recipe: overrides need not be repeated.
        self.resume_command = (
            f"{launched.command()} run {shlex.quote(model)} {out}/recipe.yaml --out {out} --resume"
        )

    def lost(self, lost: ProcessLost) -> ProcessLost:
        """The same with the command that goes on."""
        return ProcessLost(f"{lost}. What was saved before is intact. Go on with:\n  {self.resume_command}")

    def run(self, *, resume: bool, budget: Budget | None, stack: ExitStack) -> RunSummary:
        started = time.monotonic()
        with self._watched(f"reading {self.source}", [], _SMALLER_MODEL):
            if budget is not None and resume and self.folder.recipe.is_file():
                self._take(budgeting.again(self.recipe, budget, self.folder.path))
            found = alone(lambda: self.folder.check(self.source, self.recipe, resume=resume))
        alone(lambda: self.folder.sweep(list(self.recipe.stages)))
        if self.autocast is not None and self.device.type == "cuda":
            # mixers compute in float32 on bfloat16 inputs, which TF32 products take without loss
            torch.set_float32_matmul_precision("high")
        self.place = Place(self.source, self.recipe, self.device, self.weights, self.autocast)
        if budget is not None and not self.folder.recipe.is_file():
            found |= {budgeting.FACT: self._fit(budget)}
        recipe, folder = self.recipe, self.folder
        places = self._places()
        measurer, datasets, seen = processes.first(lambda: self._beforehand(places))
        found[TEXTS] = alone(lambda: folder.hold_texts(texts.marks(datasets, measurer)))
        self.trackers = Trackers(recipe, folder.path)
        stack.callback(self.trackers.finish)
        model: Any
        with self._watched(f"loading {self.source}", [], _SMALLER_MODEL):
            model, tokenizer = self.place.load()
        given = recipe.export.dtype
        dtype = models.stored_dtype(self.source) if given == "auto" else getattr(torch, given)
        check_trainable(self.source, model)
        plan = self._plan(model, None)
        if self.place.sharded:
            gathering.check(model)
            shards.check(recipe, model)
        # From here on everything that the user can get wrong has been looked at, and the folder is written.
        alone(lambda: folder.create(recipe, plan_json(plan), {**facts(self), **found}))
        results = processes.first(lambda: Results(folder.results))
        measurer.fitting.alone = not self.place.sharded
        if not self.place.sharded:
            self._row("the teacher", results, "teacher", lambda: measurer.measure(model, "teacher"))
        set_seed(recipe.run.seed)
        with self._watched("converting the model", [], _SMALLER_MODEL):
            model = surgery.convert(model, recipe.mixer, recipe.layers, recipe.mixers)
        model.eval()
        if self.place.sharded:
            self.place.settle(model)
            with surgery.mode(model, "teacher"):
                self._row("the teacher", results, "teacher", lambda: measurer.measure(model, "teacher"))
        untrained = partial(measurer.measure, model, "swapped", tasks=False, sound=False)
        self._row("the untrained model", results, "swapped, untrained", untrained)
        self._calibrate(model, seen, measurer, results)
        model = self._train(model, places, datasets, measurer, results)
        if recipe.eval.ablations:
            with self._measuring("the ablations"):
                self.place.by_holders(lambda: measurer.ablations(model, results))
        with self._watched("exporting", [], "free memory; only the export is left"):
            write = gathering.checkpoint if self.place.sharded else exporting.checkpoint
            facts_of: Any = {"rows": results.rows, "dtype": dtype, "base": self.source}
            checkpoint = self.place.by_holders(
                lambda: write(model, tokenizer, recipe, folder, **facts_of), computes=False
            )
        report = alone(lambda: write_report(folder.path))
        alone(lambda: write_json(folder.done, {"checkpoint": checkpoint.name}))
        rows = alone(lambda: results.rows)
        return RunSummary(folder.path, checkpoint, report, rows, time.monotonic() - started)

    def _take(self, recipe: Recipe) -> None:
        self.recipe = self.texts = recipe

    def _fit(self, budget: Budget) -> dict[str, Any]:
        """Scale the recipe to a budget; gives what environment.json says of it."""
        asked = self.recipe
        if budget.seconds is not None:
            if self.place.sharded or sequences.wanted(asked.run):
                given = f"--budget {budget.text}: a time is measured with whole weights and sequences"
                raise RecipeError([f"{given}; with run.shard or run.sequence give tokens (100M-tokens)"])
            self._take(budgeting.smallest(asked))
            self._look(self._places(), shared=False)  # what is wrong is told before minutes of timing
            log.info("timing some steps of every stage")
        measure = partial(
            rates.measured,
            self.source,
            device=self.device,
            autocast=self.autocast,
            weights=self.weights,
            folder=self.folder.path,
        )
        recipe, facts = budgeting.fitted(asked, budget, cuda=self.device.type == "cuda", measure=measure)
        self._take(recipe)
        return facts

    def _beforehand(self, places: list[StagePlace]) -> tuple[Measurer, dict[str, Any], Any]:
        """Texts, read and cut, of evaluation, of the stages and of the calibration, where these are not done.

        Weights are loaded for writing text alone. The last is None where there is nothing to calibrate.

        Raises:
            LinearizeError: all that is wrong with recipe, model and texts together.
        """
        ahead = self._look(places)
        tokens = texts.most(self.recipe)
        if tokens and not (places and all(place.done for place in places)):
            errors: list[LinearizeError] = []
            self._write_text(ahead.tokenizer, tokens)
            with self._watched("reading the texts", [], _FEWER_TOKENS):
                self._datasets(ahead.waiting, ahead, errors)
                if ahead.calibrates and texts.of_teacher(self.recipe.data):
                    self._calibration_text(ahead, errors)
            raise_together(errors, f"{self.recipe_name} on {self.source}")
        return ahead.measurer, ahead.datasets, ahead.calibration

    def _look(self, places: list[StagePlace], *, shared: bool = True) -> texts.Ahead:
        """What `_beforehand` does without weights and without the teacher's text; `shared`: steps are as they stay."""
        errors = [*self.wrong]
        config = models.load_config(self.source)
        tokenizer = models.load_tokenizer(models.resolve(self.source))
        settable = True
        with suppress(UnsupportedModelError):  # some show what they are on loaded weights alone
            settable = self._plan(skeleton(config), errors).parameters > 0
        with self._watched("reading the texts", [], _FEWER_TOKENS):
            ahead = texts.Ahead(Measurer(self.recipe, tokenizer, self.autocast, errors), tokenizer)
            undone = [place for place in places if not place.done]
            ahead.waiting = [place for place in undone if self._of_teacher(place)]
            ahead.calibrates = (
                settable and self.recipe.calibrate.tokens > 0 and not calibrate.is_done(self._calibration)
            )
            for place in ahead.waiting:
                data_of = self.recipe.data.of(self.recipe.stages[place.name])
                texts.look(self.recipe, data_of, tokenizer, errors)
            given = [place for place in undone if place not in ahead.waiting]
            if self.wrong:
                for place in given:
                    texts.glance(self.recipe, tokenizer, place, errors)
            else:
                self._datasets(given, ahead, errors)
            if ahead.calibrates and not self.wrong and not texts.of_teacher(self.recipe.data):
                self._calibration_text(ahead, errors)
        with collected(errors):
            shares = sequences.groups(self.recipe.run, launched.count())
            if shared:
                batches.check_parts(self.recipe.stages, shares, alike=self.place.sharded)
        sequences.check(self.recipe, self.source, config, errors)
        with collected(errors):
            tracking.wanted(self.recipe.run.trackers)
        with collected(errors):
            teachers.check(self.recipe, self.source, config, tokenizer)
        raise_together(errors, f"{self.recipe_name} on {self.source}")
        return ahead

    def _calibration_text(self, ahead: texts.Ahead, errors: list[LinearizeError]) -> None:
        with collected(errors):
            ahead.calibration = calibrate.text(self.texts, ahead.tokenizer)

    def _of_teacher(self, place: StagePlace) -> bool:
        return texts.of_teacher(self.recipe.data.of(self.recipe.stages[place.name]))

    def _datasets(self, places: list[StagePlace], ahead: texts.Ahead, errors: list[LinearizeError]) -> None:
        for place in places:
            with collected(errors):
                ahead.datasets[place.name] = texts.dataset(self.recipe, self.texts, ahead.tokenizer, place)

    def _write_text(self, tokenizer: Any, tokens: int) -> None:
        """The teacher's own text; what of it is written stays in the cache, wherever the run ends."""
        otherwise = "a smaller data.teacher.batch or data.teacher.length in a new run folder"
        with self._watched("while the teacher wrote text", [], otherwise):
            self.texts = texts.write(
                self.recipe, self.source, tokenizer, device=self.device, weights=self.weights, tokens=tokens
            )

    def _plan(self, model: Any, errors: list[LinearizeError] | None) -> surgery.Plan:
        """The plan of a model, loaded or not, with adapters and lengths held against it; `errors` as `surgery.plan`."""
        wrong = [] if errors is None else errors
        plan = planned(model, self.recipe, wrong)
        if errors is None:
            raise_together(wrong, f"{self.recipe_name} on {self.source}")
        return plan

    def _watched(self, where: str, overrides: list[str], otherwise: str) -> AbstractContextManager[None]:
        """Inside, running out of memory ends in a message with the command that goes on."""
        return memory.watched(where, lambda: self._advice(overrides, otherwise))

    def _row(self, what: str, results: Results, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure the model and write it down, unless an earlier process has."""
        with self._measuring(what):
            self.place.by_holders(lambda: results.add(name, measure, self.trackers.row))

    def _measuring(self, what: str) -> AbstractContextManager[None]:
        otherwise = "a shorter eval.length in a new run folder"
        return self._watched(f"measuring {what}", memory.less_for_evaluation(self.recipe.eval), otherwise)

    def _less_for_stage(self, name: str) -> str:
        stage = self.recipe.stages[name]
        whole_model = objectives.level_of(stage.objective) != "layer"
        overrides = memory.less_for_stage(name, stage, whole_model=whole_model)
        wide = self.weights == torch.float32 and self.device.type == "cuda"
        less = ", or run.weights=bfloat16 there (half the bytes of what does not train)" if wide else ""
        return self._advice(overrides, f"a shorter {stage.length_key(name)} in a new run folder{less}")

    def _advice(self, overrides: list[str], otherwise: str) -> str:
        begun = self.folder.recipe.is_file()
        command = self.resume_command if begun else "the same command, with --resume"
        return memory.advice(overrides, otherwise, command)

    def _places(self) -> list[StagePlace]:
        names = list(self.recipe.stages)
        return [
            StagePlace(
                index=index,
                count=len(names),
                name=name,
                folder=self.folder.stage(index, name),
                metrics=self.folder.metrics,
                resume_command=self.resume_command,
                less_memory=partial(self._less_for_stage, name),
                track=lambda line: self.trackers.line(line),
            )
            for index, name in enumerate(names, start=1)
        ]

    def _train(
        self,
        model: nn.Module,
        places: list[StagePlace],
        datasets: dict[str, Any],
        measurer: Measurer,
        results: Results,
    ) -> nn.Module:
        for place in places:
            stage = self.recipe.stages[place.name]
            with memory.watched(f"in stage '{place.name}'", place.less_memory):
                if place.done:
                    model = stages.restore(model, stage, place)
                else:
                    model = stages.train(
                        model,
                        stage,
                        place,
                        run=self.recipe.run,
                        dataset=datasets.pop(place.name),
                        length=self.recipe.data.of(stage).length,
                        autocast=self.autocast,
                        teacher=self.place.original if teachers.apart(self.recipe, place.name) else None,
                    )
            row = f"after {place.name}"
            measure = partial(measurer.measure, model, row)
            self._row(f"the model after stage '{place.name}'", results, row, measure)
        return model

    @property
    def _calibration(self) -> Path:
        return self.folder.stage(0, calibrate.NAME)

    def _calibrate(self, model: nn.Module, dataset: Any, measurer: Measurer, results: Results) -> None:
        """The mixers' start in closed form, or that of an earlier process."""
        if not calibrate.wanted(self.recipe, model):
            return
        folder = self._calibration
        with self._watched("calibrating", [], "fewer calibrate.tokens in a new run folder"):
            if not alone(lambda: calibrate.is_done(folder)):
                found = self.place.by_holders(
                    lambda: calibrate.calibrate(model, dataset, autocast=self.autocast)
                )
                alone(lambda: calibrate.write(model, folder, found))
            calibrate.restore(model, folder)
        measure = partial(measurer.measure, model, "calibrated", tasks=False, sound=False)
        self._row("the calibrated model", results, "calibrated", measure)
