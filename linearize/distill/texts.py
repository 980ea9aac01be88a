"""The training text of a run: how much of it is wanted, and the teacher's own, written before any stage needs it."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from linearize import models
from linearize.config.course import Course
from linearize.config.mix import sources
from linearize.config.names import TEACHER
from linearize.config.schema import DataConfig, Recipe, StageConfig
from linearize.data import load_texts, packed
from linearize.data.mixing import check
from linearize.distill import batches, preference
from linearize.distill.identity import digest, fingerprint
from linearize.distill.planned import planned
from linearize.distill.results import Measurer
from linearize.distill.stages import StagePlace
from linearize.errors import LinearizeError, collected, raise_together
from linearize.objectives import level_of
from linearize.progress import count, duration
from linearize.sample import job, openings, wanted, with_text

log = logging.getLogger(__name__)


@dataclass
class Ahead:
    """What a run reads before it loads weights."""

    measurer: Measurer
    tokenizer: Any
    datasets: dict[str, Any] = field(default_factory=dict)
    waiting: list[StagePlace] = field(default_factory=list)
    """Stages that wait for a teacher's text."""
    calibrates: bool = False
    calibration: Any = None


def of_teacher(data: DataConfig) -> bool:
    """Whether the teacher writes some of a section's text."""
    return TEACHER in sources(data)


def packed_tokens(data: DataConfig, stage: StageConfig) -> int:
    """Tokens of the sequences that a stage reads, `data` being `recipe.data.of(stage)`."""
    return batches.firsts(Course.of(stage, data.length))[-1] * data.length


def look(recipe: Recipe, data: DataConfig, tokenizer: Any, errors: list[LinearizeError]) -> None:
    """Before the teacher writes: what else is mixed in, and what the tokenizer has to have for it."""
    with collected(errors):
        check(tokenizer, data, without=TEACHER)
    with collected(errors):
        chat = job.chat_share(recipe.data.teacher, tokenizer)
        openings.openings(tokenizer, chat=chat > 0, longest=recipe.data.teacher.length // 2)


def glance(recipe: Recipe, tokenizer: Any, place: StagePlace, errors: list[LinearizeError]) -> None:
    """What `dataset` would refuse at once, for a run that is refused in any case: reading all of it takes minutes."""
    text = recipe.data.of(recipe.stages[place.name])
    with collected(errors):
        if text.mix:
            check(tokenizer, text)
        else:
            load_texts(
                text.source,
                split=text.split,
                text_field=text.text_field,
                template=text.template,
                tokenizer=tokenizer,
            )


def most(recipe: Recipe) -> int:
    """Tokens that the teacher is to write: what the stage takes that takes most, and no less than the calibration.

    Of all stages, done or not: which parts are read must not hang on where a run was interrupted.
    """
    needs = [0]
    for stage in recipe.stages.values():
        data = recipe.data.of(stage)
        needs.append(wanted(data, packed_tokens(data, stage)))
    if recipe.calibrate.tokens:
        needs.append(wanted(recipe.data, recipe.calibrate.tokens + recipe.data.length))
    return max(needs)


def write(
    recipe: Recipe, source: str, tokenizer: Any, *, device: torch.device, weights: torch.dtype, tokens: int
) -> Recipe:
    """The recipe with files in place of the teacher's name, which are written where they are not in the cache.

    Args:
        recipe: some of whose text is the teacher's.
        source: the MODEL argument.
        tokenizer: its.
        device, weights: as the run has them.
        tokens: of `most`.

    Raises:
        UnsupportedModelError, DataError, CheckpointError: see `sample.sample`.
        LinearizeError: loaded, the model shows that the recipe cannot convert it.
    """

    def load() -> Any:
        model = models.load_teacher(source, dtype=weights, device=str(device), for_text=True)[0]
        wrong: list[LinearizeError] = []
        planned(model, recipe, wrong)  # before the hours that its text may take
        raise_together(wrong, f"the recipe on {source}")
        return model

    read, found = with_text(
        recipe,
        tokens,
        teacher=fingerprint(source),
        tokenizer=tokenizer,
        load=load,
        compile=recipe.run.compile == "always",
    )
    gc.collect()  # the writer's captured graph holds its model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    kept, documents = found.counts.tokens["kept"], found.counts.documents
    made = f"{count(found.made)} written in {duration(found.seconds)}" if found.made else "all from the cache"
    dropped = ", ".join(f"{what} {documents[what]:,}" for what in documents if what != "kept")
    log.info(
        "text from the teacher: %s tokens in %s documents (%s; dropped: %s), in %s",
        count(kept),
        f"{documents['kept']:,}",
        made,
        dropped,
        found.folder,
    )
    return read


def dataset(recipe: Recipe, written: Recipe, tokenizer: Any, place: StagePlace) -> Any:
    """What a stage reads.

    Args:
        recipe: of the run.
        written: the same with files for what the teacher was to write.
        tokenizer: of the teacher.
        place: of the stage.
    """
    stage = recipe.stages[place.name]
    text = written.data.of(written.stages[place.name])
    seed = recipe.run.seed + place.index
    if level_of(stage.objective) == "pair":
        return preference.pairs(tokenizer, text, tokens=Course.of(stage, text.length).tokens, seed=seed)
    return packed(tokenizer, text, tokens=packed_tokens(text, stage), seed=seed, split="train")


def marks(datasets: Mapping[str, Any], measurer: Measurer) -> dict[str, str]:
    """What is read -> its checksum: the text of each stage that has not ended, and what is measured on.

    Args:
        datasets: stage -> what `dataset` gives.
        measurer: has the texts and items.
    """
    # passages that come again follow from the text, and take as long to make as many rows to read
    found = {f"stages.{name}": digest(getattr(text, "dataset", text)) for name, text in datasets.items()}
    found |= {f"eval: {name}": digest([{"input_ids": text}]) for name, text in measurer.texts.items()}
    return found | {f"eval.tasks: {task}": mark for task, mark in measurer.items.items()}
