"""The stage before all training: every mixer set to its teacher's layer in closed form, on a few texts.

No learning rate and no random number: what is found depends on the model, the recipe and the text alone. All tokens
go through the model at once, so that a layer is done when the pass has left it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize import data, storing, surgery
from linearize.config.schema import Recipe
from linearize.distill import shards
from linearize.errors import CheckpointError, LinearizeError, NotFiniteError
from linearize.mixers import calibration
from linearize.mixers.combine import SHUT
from linearize.mixers.offloaded import device_of
from linearize.mixers.seams import some
from linearize.models.cache import sha256
from linearize.objectives.whole import whole_logits
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
START = "start"
"""Name of the mixers as they came."""
OUTPUT, SHARES = ".mixer.output.", ".mixer.combine."
"""In the names of output parts' parameters, and of those that weigh a window against a recurrent branch."""


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


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to set all mixers.

    Attributes:
        own_stream: layers are seen on what the layers set before them give, else on the teacher's own inputs.
        how: of `calibration.calibrate`.
        begins: the way whose mixers it begins with, but for their output parts, which are those of the start.
    """

    name: str
    own_stream: bool = False
    how: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    begins: str = START

    def begin(self, states: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """The mixers before it, of those that the start and other ways have left."""
        start = states[START]
        return states[self.begins] | {name: value for name, value in start.items() if OUTPUT in name}

    def may_overflow(self) -> AbstractContextManager[None]:
        """What it stands in: sixteen bits may overflow behind poor layers, and then the way is none."""
        return suppress(NotFiniteError) if self.own_stream else nullcontext()


FULL = Way("full")
PLAIN = Way("plain", how={"plain": True, "sizes_only": True}, begins="full")
OWN = Way("own", own_stream=True, how={"plain": False})
OWN_PLAIN = Way("own plain", own_stream=True, how={"plain": True})
LOWERED = tuple(
    Way(name, how={"plain": True, "sizes_only": True, "heard": heard}, begins="full")
    for name, heard in (("half heard", 0.5), ("little heard", 0.15), ("window alone", SHUT))
)
"""Errors of layers may find a branch worth more than the model's answers do, so less is tried, down to nothing."""


def every_way(outputs: bool, windows: bool) -> tuple[Way, ...]:
    """All that `ways` may give, for mixers with output parts or without, with windows beside branches or without."""
    found = (FULL, PLAIN, OWN, OWN_PLAIN) if outputs else (FULL, OWN)
    return (*found, *LOWERED) if windows else found


def ways(away: Mapping[str, float], outputs: bool, windows: bool) -> Iterator[Way]:
    """The ways in which mixers are set, in order; own streams are as plain as what came nearer before.

    Args:
        away: name of a way -> how far its distributions are from the teacher's; read as far as ways were given.
        outputs: whether any mixer has an output part.
        windows: whether any mixer weighs a window against a recurrent branch.
    """
    yield FULL
    if windows:
        yield from LOWERED
    if outputs:
        yield PLAIN
    yield OWN_PLAIN if outputs and away[PLAIN.name] < away[FULL.name] else OWN


def nearest(away: Mapping[str, float]) -> str:
    """Whose distributions are nearest the teacher's, the first of equals: a way's name, or START."""
    return min(away, key=lambda name: away[name])


def has_outputs(names: Iterable[str]) -> bool:
    """Whether mixers with parameters of these names have output parts, which a plain way leaves as they are.

    A constant is set in every way.
    """
    return any(OUTPUT in name and not name.endswith(f"{OUTPUT}constant") for name in names)


def has_windows(names: Iterable[str]) -> bool:
    """Whether mixers with parameters of these names weigh a window against a recurrent branch."""
    return any(SHARES in name for name in names)


def sequences(dataset: Any, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is fitted and what is judged by: the last eighth, or everything both times where there is little."""
    items = [dataset[index] for index in range(len(dataset))]
    batch = {
        key: torch.stack([item[key] for item in items]).to(device) for key in ("input_ids", "position_ids")
    }
    apart = max(1, len(items) // JUDGED) if len(items) >= FEWEST else 0
    fitted = {key: value[: len(items) - apart] for key, value in batch.items()}
    return fitted, {key: value[-apart:] for key, value in batch.items()}


def calibrate(model: nn.Module, dataset: Any, *, autocast: torch.dtype | None) -> list[dict[str, float]]:
    """Set all mixers, in place.

    It is done in several ways, of which none is the best for every mixer: with layers seen on the teacher's own inputs,
    and on what the layers set before them give (errors that add up spoil the one, layers that compensate each other's
    the other); with output parts that follow the hidden state, and without (what fits one text may not fit another).
    What comes nearest the teacher's next-token distributions is kept, on sequences that were not fitted where there
    are enough; the start that the mixers came with counts too, and windows whose branches are heard less, down to not
    at all: errors of layers, which branches are fitted by, do not say how far a model's answers are.

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
    fitted, judged = sequences(dataset, device)
    computing = nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)
    states = {START: state(model)}
    found: dict[str, list[dict[str, float]]] = {START: []}
    outputs, windows = has_outputs(states[START]), has_windows(states[START])
    model.eval()
    passes = 2 + int(outputs) + len(LOWERED) * int(windows)
    with torch.no_grad(), Meter("calibrate", passes * len(layers), "layers") as meter:
        with computing:
            away = {START: _divergence(model, judged)}
        for way in ways(away, outputs, windows):
            surgery.load_mixer_state(model, way.begin(states))
            with way.may_overflow(), computing:
                found[way.name] = _pass(model, fitted, way.own_stream, meter, **way.how)
                away[way.name] = _divergence(model, judged)
                states[way.name] = state(model)
        best = nearest(away)
        surgery.load_mixer_state(model, states[best])
    return found[best]


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all mixers' parameters."""
    return {name: value.detach().clone() for name, value in surgery.mixer_state(model).items()}


def _pass(
    model: nn.Module, batch: dict[str, Tensor], own_stream: bool, meter: Meter, **how: Any
) -> list[dict[str, float]]:
    """All layers from first to last: the text goes through once, or twice side by side, as teacher and student.

    `how` is that of `calibration.calibrate`.
    """
    found: list[dict[str, float]] = []
    if own_stream:
        batch = twice(batch)
    with surgery.observe(model, observer(found, own_stream, meter, **how)):
        shards.run_body(model, **batch, use_cache=False)
    return found


def twice(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text as the teacher's stream and as the student's."""
    return {key: value.repeat(2, 1) for key, value in batch.items()}


def observer(
    found: list[dict[str, float]], own_stream: bool, meter: Meter, **how: Any
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


def over(sequences: list[float]) -> float:
    """The mean of divergences, infinite where it is not a number."""
    mean = sum(sequences) / len(sequences)
    return mean if mean == mean else float("inf")


def _divergence(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """Mean KL to the teacher's next-token distribution, a sequence at a time; infinite where it is not a number."""
    found = []
    for ids, places in zip(batch["input_ids"], batch["position_ids"], strict=True):
        given = {"input_ids": ids[None], "position_ids": places[None]}
        with surgery.mode(model, "teacher"):
            teacher = whole_logits(model, **given)[0]
        student = whole_logits(model, **given)[0]
        found.append(divergence(teacher, student))
    return over(found)


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
