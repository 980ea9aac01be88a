"""The main job: teacher, surgery, stages, exported checkpoint; measured on the way, resumable anywhere."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import time
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from torch import nn
from transformers import set_seed

from linearize import data, export, launched, models, objectives, surgery
from linearize.config.course import Course
from linearize.config.schema import Recipe
from linearize.distill import batches, calibrate, memory, preference, processes, stages
from linearize.distill.callbacks import RunStopped
from linearize.distill.checkpoint import write_json, writing
from linearize.distill.device import resolve_device, resolve_precision, resolve_weights
from linearize.distill.folder import ADAPTER, RunFolder
from linearize.distill.lock import held
from linearize.distill.positions import check_lengths
from linearize.distill.processes import ProcessLost, alone
from linearize.distill.results import Measurer, Results
from linearize.distill.stages import StagePlace
from linearize.distill.trainable import check_ranks, check_reach, needs
from linearize.errors import LinearizeError, UnsupportedModelError, collected, raise_together
from linearize.eval import tables
from linearize.eval.report import write_report
from linearize.export import rounding
from linearize.models.sound import check_trainable
from linearize.signals import exit_code
from linearize.surgery.inspection import skeleton

_SMALLER_MODEL = "a smaller model, or run.device=cpu where the machine has more memory than the device"


@dataclass(frozen=True)
class RunSummary:
    """What a run left behind."""

    folder: Path
    checkpoint: Path
    report: Path
    rows: list[dict[str, Any]]
    """The rows of results.json."""
    seconds: float
    """Wall time of this process's share of the run."""

    def table(self) -> Group:
        """The rows for the terminal: perplexities, and the tasks' accuracies where there are any."""
        return tables.results(self.rows, metrics=["acc"])


def run(
    model: str, recipe: Recipe, out: str | Path, *, resume: bool = False, recipe_name: str = ""
) -> RunSummary:
    """Convert a model by a recipe: train, measure, export and report.

    Args:
        model: hub id, checkpoint folder, GGUF file or alias.
        recipe: composed by `config.compose`.
        out: the run folder.
        resume: go on with the run in `out`, from its newest intact checkpoint; starts one when there is none. The
            recipe may differ in what does not change the result; `distill.continuing` lists that.
        recipe_name: what the user called the recipe, for the report.

    Raises:
        RunFolderError: `out` is in use by another process, or holds another run.
        ModelNotFoundError, UnsupportedModelError, DataError: before anything is written.
        RunStopped: stopped on request; the message holds the command that goes on.
        NotFiniteError: the teacher, or what a stage has made of it, gives NaN for a text.
        NonFiniteLossError, CheckpointError: training or writing failed; what was saved before is intact.
        OutOfMemoryError: the message holds the command that goes on with less.
    """
    folder = RunFolder(Path(out))
    job = _Job(model, recipe, folder, recipe_name or recipe.description)
    with ExitStack() as stack:
        try:
            stack.enter_context(processes.joined(job.device))
            processes.alone(folder.look)
            processes.alone(lambda: stack.enter_context(held(folder.path)))
            stack.enter_context(writing(folder.path))
            if launched.first():
                stack.callback(lambda: folder.sweep(list(recipe.stages)))
            return job.run(resume=resume)
        except KeyboardInterrupt as stop:
            if not folder.recipe.is_file():
                raise
            raise RunStopped(
                f"aborted; what was saved before is intact. Go on with:\n  {job.resume_command}",
                exit_code(stop),
            ) from None
        except ProcessLost as lost:
            raise ProcessLost(
                f"{lost}. What was saved before is intact. Go on with:\n  {job.resume_command}"
            ) from lost


class _Job:
    """One call of `run`."""

    def __init__(self, model: str, recipe: Recipe, folder: RunFolder, recipe_name: str) -> None:
        self.source = model
        self.recipe = recipe
        self.folder = folder
        self.recipe_name = recipe_name
        self.device = resolve_device(recipe.run)
        self.autocast = resolve_precision(recipe.run, self.device)
        self.weights = resolve_weights(recipe.run, self.device)
        out = shlex.quote(str(folder.path))
        # The folder's own recipe: overrides need not be repeated.
        self.resume_command = (
            f"{launched.command()} run {shlex.quote(model)} {out}/recipe.yaml --out {out} --resume"
        )

    def run(self, *, resume: bool) -> RunSummary:
        started = time.monotonic()
        with self._watched(f"reading {self.source}", [], _SMALLER_MODEL):
            found = alone(lambda: self.folder.check(self.source, self.recipe, resume=resume))
        alone(lambda: self.folder.sweep(list(self.recipe.stages)))
        if self.autocast is not None and self.device.type == "cuda":
            # mixers compute in float32 on bfloat16 inputs, which TF32 products take without loss
            torch.set_float32_matmul_precision("high")
        recipe, folder = self.recipe, self.folder
        places = self._places()
        measurer, datasets, seen = processes.first(lambda: self._beforehand(places))
        model: Any
        with self._watched(f"loading {self.source}", [], _SMALLER_MODEL):
            model, tokenizer = models.load_teacher(
                self.source, dtype=self.weights, device=str(self.device), for_text=True
            )
        given = recipe.export.dtype
        dtype = models.stored_dtype(self.source) if given == "auto" else getattr(torch, given)
        check_trainable(self.source, model)
        plan = self._plan(model, None)
        # From here on everything that the user can get wrong has been looked at, and the folder is written.
        alone(lambda: folder.create(recipe, plan_json(plan), {**self._facts(), **found}))
        results = processes.first(lambda: Results(folder.results))
        with self._measuring("the teacher"):
            alone(lambda: results.add("teacher", lambda: measurer.measure(model, "teacher")))
        set_seed(recipe.run.seed)
        with self._watched("converting the model", [], _SMALLER_MODEL):
            model = surgery.convert(model, recipe.mixer, recipe.layers, recipe.mixers)
        model.eval()
        with self._measuring("the untrained model"):
            alone(
                lambda: results.add(
                    "swapped, untrained",
                    lambda: measurer.measure(model, "swapped", tasks=False, sound=False),
                )
            )
        self._calibrate(model, seen, measurer, results)
        model = self._train(model, places, datasets, measurer, results)
        if recipe.eval.ablations:
            with self._measuring("the ablations"):
                alone(lambda: measurer.ablations(model, results))
        with self._watched("exporting", [], "free memory; only the export is left"):
            checkpoint = alone(lambda: self._export(model, tokenizer, results, dtype))
        report = alone(lambda: write_report(folder.path))
        alone(lambda: write_json(folder.done, {"checkpoint": checkpoint.name}))
        rows = alone(lambda: results.rows)
        return RunSummary(folder.path, checkpoint, report, rows, time.monotonic() - started)

    def _beforehand(self, places: list[StagePlace]) -> tuple[Measurer, dict[str, Any], Any]:
        """Texts, read and cut, of evaluation, of the stages and of the calibration, where these are not done.

        No weight is loaded. The last is None where there is nothing to calibrate.

        Raises:
            LinearizeError: all that is wrong with recipe, model and texts together.
        """
        errors: list[LinearizeError] = []
        config = models.load_config(self.source)
        tokenizer = models.load_tokenizer(models.resolve(self.source))
        settable = True
        with suppress(UnsupportedModelError):  # some show what they are on loaded weights alone
            settable = self._plan(skeleton(config), errors).parameters > 0
        where = "a smaller token budget (stages.*.tokens) in a new run folder"
        datasets, seen = {}, None
        with self._watched("reading the texts", [], where):
            measurer = Measurer(self.recipe, tokenizer, self.autocast, errors)
            for place in places:
                if not place.done:
                    with collected(errors):
                        datasets[place.name] = self._dataset(tokenizer, place)
            if settable and self.recipe.calibrate.tokens > 0 and not calibrate.is_done(self._calibration):
                with collected(errors):
                    seen = calibrate.text(self.recipe, tokenizer)
        with collected(errors):
            batches.check_parts(self.recipe.stages, launched.count())
        raise_together(errors, f"{self.recipe_name} on {self.source}")
        return measurer, datasets, seen

    def _plan(self, model: Any, errors: list[LinearizeError] | None) -> surgery.Plan:
        """The plan of a model, loaded or not, with adapters and lengths held against it; `errors` as `surgery.plan`."""
        recipe, wrong = self.recipe, [] if errors is None else errors
        asked = needs(recipe.stages.values())
        plan = surgery.plan(model, recipe.mixer, recipe.layers, **asked, errors=wrong, mixers=recipe.mixers)
        with collected(wrong):
            check_ranks(recipe, plan, getattr(model.config.get_text_config(), "hidden_size", None))
        with collected(wrong):
            check_reach(recipe, plan)
        with collected(wrong):
            check_lengths(recipe, model)
        if errors is None:
            raise_together(wrong, f"{self.recipe_name} on {self.source}")
        return plan

    def _watched(self, where: str, overrides: list[str], otherwise: str) -> AbstractContextManager[None]:
        """Inside, running out of memory ends in a message with the command that goes on."""
        return memory.watched(where, lambda: self._advice(overrides, otherwise))

    def _measuring(self, what: str) -> AbstractContextManager[None]:
        otherwise = "a shorter eval.length in a new run folder"
        return self._watched(f"measuring {what}", memory.less_for_evaluation(self.recipe.eval), otherwise)

    def _less_for_stage(self, name: str) -> str:
        stage = self.recipe.stages[name]
        whole_model = objectives.level_of(stage.objective) != "layer"
        overrides = memory.less_for_stage(name, stage, whole_model=whole_model)
        wide = self.weights == torch.float32 and self.device.type == "cuda"
        less = ", or run.weights=bfloat16 there (half the bytes of what does not train)" if wide else ""
        return self._advice(overrides, f"a shorter data.length in a new run folder{less}")

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
            )
            for index, name in enumerate(names, start=1)
        ]

    def _dataset(self, tokenizer: Any, place: StagePlace) -> Any:
        stage = self.recipe.stages[place.name]
        text = self.recipe.data.of(stage)
        course = Course.of(stage, text.length)
        seed = self.recipe.run.seed + place.index
        if objectives.level_of(stage.objective) == "pair":
            return preference.pairs(tokenizer, text, tokens=course.tokens, seed=seed)
        tokens = batches.firsts(course)[-1] * text.length
        return data.packed(tokenizer, text, tokens=tokens, seed=seed, split="train")

    def _train(
        self,
        model: nn.Module,
        places: list[StagePlace],
        datasets: dict[str, Any],
        measurer: Measurer,
        results: Results,
    ) -> nn.Module:
        base_changes = False
        for place in places:
            stage = self.recipe.stages[place.name]
            base_changes = base_changes or "all" in stage.train
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
                        teacher=self._original if base_changes else None,
                    )
            row = f"after {place.name}"
            with self._measuring(f"the model after stage '{place.name}'"):
                alone(partial(results.add, row, partial(measurer.measure, model, row)))
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
                alone(lambda: self._settle(model, dataset))
            calibrate.restore(model, folder)
        with self._measuring("the calibrated model"):
            measure = partial(measurer.measure, model, "calibrated", tasks=False, sound=False)
            alone(lambda: results.add("calibrated", measure))

    def _settle(self, model: nn.Module, dataset: Any) -> None:
        found = calibrate.calibrate(model, dataset, autocast=self.autocast)
        calibrate.write(model, self._calibration, found)

    def _original(self) -> nn.Module:
        """A frozen copy of the teacher, for when the model's own base weights are no longer the teacher's."""
        original, _ = models.load_teacher(self.source, dtype=self.weights, device=str(self.device))
        return original.requires_grad_(False).eval()

    def _export(self, model: Any, tokenizer: Any, results: Results, dtype: torch.dtype) -> Path:
        """The checkpoint folder: adapters merged, or beside it in `adapter` when a stage says `merge: false`."""
        apart = None
        if hasattr(model, "merge_and_unload"):
            lora = [stage.lora for stage in self.recipe.stages.values() if stage.lora is not None]
            if all(adapters.merge for adapters in lora):
                model = rounding.merged(model, dtype)
            else:
                apart = self.folder.path / ADAPTER
                _save_adapter(model, apart, self.folder.checkpoint)
                model = model.unload()
        path = export.save(
            rounding.in_dtype(model, dtype),
            self.folder.checkpoint,
            tokenizer=tokenizer,
            recipe=dataclasses.asdict(self.recipe),
            metrics={"rows": results.rows},
            base=self.source,
            check=True,
        )
        if apart is not None:
            apart.rename(path / "adapter")
        return path

    def _facts(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "model": self.source,
            "recipe": self.recipe_name,
            "device": name,
            "precision": f"bf16 autocast, {str(self.weights)[6:]} weights, float32 masters"
            if self.autocast
            else "float32",
            "seed": self.recipe.run.seed,
            "processes": processes.count(),
        }


def _save_adapter(model: Any, path: Path, base: Path) -> None:
    """Write a PeftModel's adapter; `PeftModel.from_pretrained(linearize.load(base), base / "adapter")` loads it."""
    shutil.rmtree(path, ignore_errors=True)
    for config in model.peft_config.values():
        # not the teacher, over which the adapter would mean nothing
        config.base_model_name_or_path = str(base)
    # "auto" would ask the hub whether the vocabulary has grown.
    model.save_pretrained(path, save_embedding_layers=False)


def plan_json(plan: Any) -> dict[str, Any]:
    """The plan for plan.json: one row a layer, and the totals."""
    totals = plan.to_dict()
    return {"rows": totals.pop("layers"), **totals}
