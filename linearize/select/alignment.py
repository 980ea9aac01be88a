"""What precedes the scores of layers: the recipe's calibration, and its first transfer stage at a budget of minutes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from linearize import data, objectives, surgery
from linearize.config.course import Course
from linearize.config.schema import CalibrateConfig, Recipe, StageConfig, StageDataConfig
from linearize.distill import calibrate, stages
from linearize.distill import texts as training
from linearize.distill.device import resolve_device, resolve_weights
from linearize.distill.stages import StagePlace
from linearize.errors import CheckpointError
from linearize.storing import remove

log = logging.getLogger(__name__)


def stage_of(recipe: Recipe, tokens: int, length: int) -> tuple[str, StageConfig] | None:
    """The recipe's first stage of a loss per layer, for mixers alone and one sequence a step.

    Few tokens need many steps more than they need large ones.

    Args:
        recipe: composed.
        tokens: training tokens in all; 0 aligns nothing.
        length: tokens in a sequence.

    Returns:
        Its name and its settings, or None where nothing is to be aligned.
    """
    for name, stage in recipe.stages.items():
        if tokens and objectives.level_of(stage.objective) == "layer":
            text = replace(stage.data or StageDataConfig(), length=length)
            own: dict[str, Any] = {"train": ["mixers"], "lora": None, "freeze": [], "untie": False}
            own |= {"tokens": tokens, "batch_size": 1, "micro_batch": 1, "log_every": 1, "save_every": 20}
            return name, replace(stage, data=text, **own)
    return None


def dataset(recipe: Recipe, name: str, stage: StageConfig, tokenizer: Any, source: str) -> Any:
    """The packed text of the alignment, written by the teacher where the recipe says so.

    Args:
        recipe: composed.
        name, stage: see `stage_of`.
        tokenizer: of the model.
        source: the MODEL argument.

    Raises:
        DataError: as `data.packed`; and see `distill.texts.write`.
    """
    if training.of_teacher(recipe.data.of(stage)):
        device = resolve_device(recipe.run)
        own = replace(recipe, stages={name: stage}, calibrate=CalibrateConfig())
        weights = resolve_weights(recipe.run, device)
        recipe = training.write(
            own, source, tokenizer, device=device, weights=weights, tokens=training.most(own)
        )
        stage = recipe.stages[name]
    text = recipe.data.of(stage)
    return data.packed(tokenizer, text, tokens=Course.of(stage, text.length).tokens, seed=recipe.run.seed + 1)


def calibration(recipe: Recipe, tokens: int, tokenizer: Any, source: str) -> Any:
    """The text that mixers are calibrated on, of `tokens` tokens at most, or None where nothing is to be calibrated.

    Args:
        recipe: composed.
        tokens: see `stage_of`.
        tokenizer: of the model.
        source: the MODEL argument.

    Raises:
        DataError: as `data.packed`; and see `distill.texts.write`.
    """
    recipe = replace(recipe, stages={}, calibrate=CalibrateConfig(min(tokens, recipe.calibrate.tokens)))
    if not recipe.calibrate.tokens:
        return None
    if training.of_teacher(recipe.data):
        device = resolve_device(recipe.run)
        weights = resolve_weights(recipe.run, device)
        most = training.most(recipe)
        recipe = training.write(recipe, source, tokenizer, device=device, weights=weights, tokens=most)
    return calibrate.text(recipe, tokenizer)


def calibrated(model: Any, texts: Any, folder: Path, autocast: torch.dtype | None) -> None:
    """Set the mixers in closed form, or to what `folder` holds.

    Args:
        model: converted.
        texts: of `calibration`.
        folder: of the result.
        autocast: compute dtype, or None.

    Raises:
        NotFiniteError: as `distill.calibrate.calibrate`.
        CheckpointError: the disk is full or refuses.
    """
    if not any(layer.mixer.added_parameters for layer in surgery.converted(model)):
        return
    if calibrate.is_done(folder):
        try:
            return calibrate.restore(model, folder)
        except CheckpointError:
            log.info("%s is damaged: the calibration is made again", folder)
            remove(folder)
    calibrate.write(model, folder, calibrate.calibrate(model, texts, autocast=autocast))


def align(
    model: Any,
    recipe: Recipe,
    name: str,
    stage: StageConfig,
    texts: Any,
    folder: Path,
    *,
    autocast: torch.dtype | None,
    command: str,
    less_memory: Callable[[], str],
) -> Any:
    """Train the mixers, or take what `folder` holds.

    Args:
        model: converted.
        recipe, name, stage: see `stage_of`.
        texts: of `dataset`.
        folder: of the stage's checkpoints and its result.
        autocast: compute dtype, or None.
        command: goes on after a stop.
        less_memory: what to do where memory runs out.

    Raises:
        RunStopped, NonFiniteLossError, CheckpointError, OutOfMemoryError: as `distill.stages.train`.
    """
    if not any(layer.mixer.added_parameters for layer in surgery.converted(model)):
        return model
    place = StagePlace(1, 1, name, folder, folder / "metrics.jsonl", command, less_memory)
    if place.done:
        try:
            return stages.restore(model, stage, place).requires_grad_(False).eval()
        except CheckpointError:
            log.info("%s is damaged: the alignment is made again", folder)
            remove(folder)
    folder.mkdir(parents=True, exist_ok=True)
    length = recipe.data.of(stage).length
    return stages.train(
        model,
        stage,
        place,
        run=recipe.run,
        dataset=texts,
        length=length,
        autocast=autocast,
        teacher=None,
    )
