"""The stage before all training: every mixer set to its teacher's layer in closed form, on a few texts.

No learning rate and no random number: what is found depends on the model, the recipe and the text alone. All tokens
go through the model at once, so that a layer is done when the pass has left it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize import data, storing, surgery
from linearize.config.schema import Recipe
from linearize.distill import shards
from linearize.errors import CheckpointError, LinearizeError, NotFiniteError
from linearize.mixers import calibration
from linearize.mixers.offloaded import device_of
from linearize.mixers.seams import some
from linearize.models.cache import sha256
from linearize.progress import Meter

NAME = "calibrate"
"""Of the folder, stage-0-calibrate."""
FINAL = "final.safetensors"
DONE = "done.json"
LENGTH = 1024
"""Tokens in a sequence at most: the teacher's attention is looked at whole."""
ROWS = 128
"""Tokens whose distributions over the vocabulary are held at once."""
JUDGED, FEWEST = 8, 4
"""One sequence of so many is judged by and not fitted, from so many sequences on."""


def wanted(recipe: Recipe, model: nn.Module) -> bool:
    """Whether a recipe asks for it and a converted model has anything to set."""
    return recipe.calibrate.tokens > 0 and any(
        calibration.can(layer.mixer) for layer in surgery.converted(model)
    )


def text(recipe: Recipe, tokenizer: Any) -> Any:
    """The sequences that are looked at: of the recipe's own training text, in the order of `run.seed`.

    Raises:
        DataError: see `data.packed`.
    """
    given = recipe.data
    short = dataclasses.replace(given, length=min(given.length, LENGTH), echo=0.0)
    return data.packed(tokenizer, short, tokens=recipe.calibrate.tokens, seed=recipe.run.seed, split="train")


def calibrate(model: nn.Module, dataset: Any, *, autocast: torch.dtype | None) -> list[dict[str, float]]:
    """Set all mixers, in place.

    It is done in several ways, of which none is the best for every mixer: with layers seen on the teacher's own inputs,
    and on what the layers set before them give (errors that add up spoil the one, layers that compensate each other's
    the other); with output parts that follow the hidden state, and without (what fits one text may not fit another).
    What comes nearest the teacher's next-token distributions is kept, on sequences that were not fitted where there
    are enough; the start that the mixers came with counts too.

    Args:
        model: converted, untrained.
        dataset: packed sequences, which go through the model together; the last eighth is judged by.
        autocast: compute dtype of the teacher's pass, or None.

    Returns:
        For each converted layer its number and the squared error of its output over the teacher's squared size, before
        and after, on the inputs by which it was set; [] where the start is kept as it was.

    Raises:
        NotFiniteError: a statistic or what is found by it is not finite; names layer and statistic.
    """
    layers = surgery.converted(model)
    device = device_of(layers[0])
    items = [dataset[index] for index in range(len(dataset))]
    batch = {
        key: torch.stack([item[key] for item in items]).to(device) for key in ("input_ids", "position_ids")
    }
    apart = max(1, len(items) // JUDGED) if len(items) >= FEWEST else 0
    fitted = {key: value[: len(items) - apart] for key, value in batch.items()}
    judged = {key: value[-apart:] for key, value in batch.items()}
    computing = nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)
    start = _state(model)
    outputs = {name: value for name, value in start.items() if ".mixer.output." in name}
    model.eval()
    with torch.no_grad(), Meter("calibrate", (3 if outputs else 2) * len(layers), "layers") as meter:
        with computing:
            best, least, found = start, _divergence(model, judged), []

        def tried(begin: dict[str, Tensor], own_stream: bool, **how: bool) -> float:
            nonlocal best, least, found
            surgery.load_mixer_state(model, begin)
            with computing:
                made = _pass(model, fitted, own_stream, meter, **how)
                away = _divergence(model, judged)
            if away < least:
                best, least, found = _state(model), away, made
            return away

        full, plain = tried(start, own_stream=False), False
        if outputs:
            plain = tried(_state(model) | outputs, own_stream=False, plain=True, sizes_only=True) < full
        with suppress(NotFiniteError):  # sixteen bits may overflow behind poor layers
            tried(start, own_stream=True, plain=plain)
        surgery.load_mixer_state(model, best)
    return found


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in surgery.mixer_state(model).items()}


def _pass(
    model: nn.Module, batch: dict[str, Tensor], own_stream: bool, meter: Meter, **how: bool
) -> list[dict[str, float]]:
    """All layers from first to last: the text goes through once, or twice side by side, as teacher and student.

    `how` is that of `calibration.calibrate`.
    """
    found: list[dict[str, float]] = []
    if own_stream:
        batch = {key: value.repeat(2, 1) for key, value in batch.items()}
    with surgery.observe(model, observer(found, own_stream, meter, **how)):
        shards.run_body(model, **batch, use_cache=False)
    return found


def observer(
    found: list[dict[str, float]], own_stream: bool, meter: Meter, **how: bool
) -> Callable[[Any], Tensor]:
    """Sets each layer's mixer as the layer shows itself.

    Args:
        found: gets a row for each layer.
        own_stream: the batch is the text twice, as the teacher's stream and the student's.
        meter: moved by a layer.
        how: of `calibration.calibrate`.
    """

    def observe(call: Any) -> Tensor:
        teacher, student = _halves(call) if own_stream else (call, call)
        with torch.autocast(call.q.device.type, enabled=False):
            fitted = calibration.calibrate(student, teacher, **how)
            found.append({"layer": call.layer_idx, "before": fitted.before, "after": fitted.after})
            meter.advance(1, error=fitted.after)
            if not own_stream:
                return call.teacher
            return torch.cat([teacher.teacher, student.student().to(teacher.teacher.dtype)])

    return observe


def divergence(teacher: Tensor, student: Tensor) -> float:
    """Mean KL of a student's next-token distributions to the teacher's, of logits [T, V]."""
    total = 0.0
    for rows in zip(teacher.split(ROWS), student.split(ROWS), strict=True):
        wanted, had = (logits.float().log_softmax(-1) for logits in rows)
        total += float((wanted.exp() * (wanted - had)).sum()) / len(teacher)
    return total


def _divergence(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """Mean KL to the teacher's next-token distribution, a sequence at a time; infinite where it is not a number."""
    whole: Any = model
    total = 0.0
    for ids, places in zip(batch["input_ids"], batch["position_ids"], strict=True):
        given = {"input_ids": ids[None], "position_ids": places[None], "use_cache": False}
        with surgery.mode(model, "teacher"):
            teacher = whole(**given).logits[0]
        student = whole(**given).logits[0]
        total += divergence(teacher, student)
    mean = total / len(batch["input_ids"])
    return mean if mean == mean else float("inf")


def _halves(call: Any) -> tuple[Any, Any]:
    """The call of the teacher's stream, and that of the student's, whose target is the teacher's answer in its own."""
    batch = len(call.q) // 2
    made = [some(call, rows) for rows in (slice(batch), slice(batch, None))]
    made[1].teacher = made[0].teacher
    return made[0], made[1]


def write(model: nn.Module, folder: Path, found: list[dict[str, float]]) -> None:
    """Save what was found, as the result of a stage.

    Raises:
        CheckpointError: the disk is full or refuses.
    """
    write_mixers(surgery.mixer_state(model), folder, found)


def write_mixers(mixers: Mapping[str, Tensor], folder: Path, found: list[dict[str, float]]) -> None:
    """`write`, of what `surgery.mixer_state` would give.

    Raises:
        CheckpointError: the disk is full or refuses.
    """
    storing.make_folder(folder)
    storing.write_tensors_file(folder / FINAL, mixers)
    storing.write_json(folder / DONE, {"stage": NAME, "layers": found, "sha256": sha256(folder / FINAL)})


def is_done(folder: Path) -> bool:
    """Whether an earlier process has written a result."""
    return (folder / DONE).is_file()


def restore(model: nn.Module, folder: Path, part: bool = False) -> None:
    """Put a written result into a converted model.

    Args:
        model: converted.
        folder: of the result.
        part: the model is a part of the one that was calibrated.

    Raises:
        CheckpointError: it is damaged or of another recipe.
    """
    remedy = f"Delete {folder} and go on with --resume: the mixers are then calibrated again"
    said = storing.read_json(folder / DONE, remedy).get("sha256")
    tensors = storing.read_tensors(folder / FINAL)
    if said != sha256(folder / FINAL):
        raise CheckpointError(f"{folder / FINAL}: is not what was written (another checksum). {remedy}")
    if part:
        own = surgery.mixer_state(model)
        tensors = {name: value for name, value in tensors.items() if name in own}
    try:
        surgery.load_mixer_state(model, tensors)
    except (LinearizeError, RuntimeError) as error:
        raise CheckpointError(f"{folder / FINAL}: {error}. {remedy}") from error
