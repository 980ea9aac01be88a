"""What may be changed when a run goes on: settings that say how its result is computed, and not what it is.

This is the one place that knows them:

- `stages.*.micro_batch`. A step sees the same sequences in the same order, its loss is a mean over all of the step's
  tokens (pairs, sequences), and a packed sequence has no padding, so that the mean over its parts is the mean over the
  step: equal up to rounding. Three things are made for each part: what `lora.dropout` draws, the mean over queries that
  see something in `window_dropout`, and the norm that `attention_output_relative` divides by. Where a stage has one of
  these the numbers become others, as good as the old ones; the run says so and goes on.
- `stages.*.gradient_checkpointing`: activations are computed again in place of being kept, under the same random state.
- `stages.*.save_every`: when checkpoints are written, not what is trained.
- `eval.batch_size`: windows and items are scored one by one, whatever the batch; equal up to rounding.
- `run.capture`, `run.compile`: the same kernels in the same order, or the same operations fused: equal up to rounding.
- `run.shard`: where weights are kept, not what they become; equal up to rounding.
- `run.sequence`: who computes which tokens of a sequence; equal up to rounding.
- `run.teacher_device`: where a teacher's weights are kept, not what they are.
- `run.trackers`, `run.profile`: what is written beside.
- `run.workers`: an item is a function of its place, whoever reads it.
- `export.dtype`: the export comes last.
- `run.device`, `run.precision`, `run.weights`, where both spellings mean the same on this machine (auto and cpu
  without a GPU).

Everything else changes the result and is refused.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from linearize.config.schema import RunConfig, StageConfig, TeacherConfig
from linearize.distill.device import resolve_device, resolve_precision, resolve_weights
from linearize.errors import LinearizeError

FREE = (
    "eval.batch_size",
    "export.dtype",
    *(
        f"run.{key}"
        for key in (
            "workers",
            "capture",
            "compile",
            "shard",
            "sequence",
            "teacher_device",
            "trackers",
            "profile",
        )
    ),
)
FREE_IN_STAGE = ("gradient_checkpointing", "save_every", "micro_batch")
OF_EACH_MICRO_BATCH = ("attention_output_relative",)
"""Objectives whose loss of a batch is not the mean of its parts' losses."""


@dataclass(frozen=True)
class Changes:
    """The fields in which two recipes differ, each as "stages.transfer.lr: 0.01 -> 0.005"."""

    accepted: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Stages whose numbers become others, with the reason."""


def changes(before: dict[str, Any], after: dict[str, Any]) -> Changes:
    """Sort what differs between a run's recipe and the one that it is to go on with.

    Args:
        before, after: recipes as mappings.
    """
    before = _in_todays_words(before)
    old, new = _flat(before), _flat(after)
    found = Changes()
    for key in sorted({*old, *new}):
        was, now = old.get(key), new.get(key)
        if was == now:
            continue
        line = f"{key}: {was} -> {now}"
        refusal = _refusal(key, before, after)
        if refusal is None:
            found.accepted.append(line)
        else:
            found.refused.append(line + refusal)
    for name, stage in (after.get("stages") or {}).items():
        if any(line.startswith(f"stages.{name}.micro_batch:") for line in found.accepted):
            found.notes.extend(_other_numbers(name, stage))
    return found


def _refusal(key: str, before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """None where a change of `key` leaves the result as it is, else what to add to the line that refuses it."""
    if key in FREE:
        return None
    if key in ("run.device", "run.precision", "run.weights"):
        # a run from before there was `run.weights`
        old = {"weights": "float32", **_mapping(before.get("run"))}
        begun = " (it began with run.weights=float32)" if key not in _flat(before) else ""
        return None if _same_place(old, after.get("run")) else begun
    section, *rest = key.split(".")
    name, setting = ".".join(rest[:-1]), rest[-1] if rest else ""
    stages = [_mapping(_mapping(recipe.get("stages")).get(name)) for recipe in (before, after)]
    if section != "stages" or not all(stages):
        return ""
    if setting in FREE_IN_STAGE:
        return None
    if setting == "batch_size":
        return f" (a step's sequences must stay; with less memory: stages.{name}.micro_batch)"
    return ""


def _in_todays_words(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe from when `batch_size` was a part of a step and `grad_accum` how many there are."""
    stages = {}
    for name, stage in _mapping(recipe.get("stages")).items():
        batch, parts = _mapping(stage).get("batch_size"), _mapping(stage).get("grad_accum")
        if type(batch) is int and type(parts) is int:
            rest = {key: value for key, value in stage.items() if key != "grad_accum"}
            stage = {**rest, "batch_size": batch * parts, "micro_batch": batch}
        # and one from before gradients could be clipped layer by layer clips them together
        stages[name] = {"clip_by": StageConfig.clip_by, **stage} if isinstance(stage, dict) else stage
    # a run from before there was a calibration has none
    recipe = {"calibrate": {"tokens": 0}, **recipe}
    # and one from before a teacher wrote text reads what it read
    recipe["data"] = {"mix": {}, "teacher": asdict(TeacherConfig()), **_mapping(recipe.get("data"))}
    return {**recipe, "stages": stages} if stages else recipe


def _same_place(before: dict[str, Any], after: Any) -> bool:
    try:
        places = []
        for settings in (before, after):
            run = RunConfig(**_mapping(settings))
            device = resolve_device(run)
            places.append((device, resolve_precision(run, device), resolve_weights(run, device)))
    except (LinearizeError, TypeError):
        return False
    return places[0] == places[1]


def _other_numbers(name: str, stage: dict[str, Any]) -> list[str]:
    reasons = []
    if stage.get("window_dropout"):
        reasons.append("window_dropout counts the queries that see something in each micro-batch")
    if _mapping(stage.get("lora")).get("dropout"):
        reasons.append("lora.dropout draws for each micro-batch")
    for objective in OF_EACH_MICRO_BATCH:
        if objective in _mapping(stage.get("objective")):
            reasons.append(f"{objective} divides by the norm of each micro-batch")
    return [
        f"stages.{name}: {reason}, so its numbers become others, as good as the old" for reason in reasons
    ]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flat(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat
