"""The models that stand in one table: the given one, its teacher, and the controls, without which neither says much.

A conversion is read against what its parts do without training (the untrained swap), against the plain window that
needs no training at all (swa_sinks, Xiao et al. 2023, arXiv 2309.17453), and against itself with one branch off. Only
the given model and the teacher are loaded; a control shares their weights and lives for its own measurements.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from linearize import surgery
from linearize.config import compose
from linearize.config.names import DEFAULT
from linearize.errors import LinearizeError, UnsupportedModelError
from linearize.eval.ablation import NO_LINEAR, NO_WINDOW
from linearize.eval.rows import STUDENT, TEACHER
from linearize.surgery.schema import upgraded

log = logging.getLogger(__name__)

UNTRAINED = "untrained swap"
SINKS = "swa_sinks"
CONTROLS = (UNTRAINED, SINKS, NO_LINEAR, NO_WINDOW)
"""Those that are made from the given model and its teacher, in the order in which they are measured."""


@dataclass(frozen=True)
class Entrant:
    """One row of the table.

    Attributes:
        name: display name of the model that it is or belongs to.
        role: student, teacher or the name of a control.
        identity: what tells its weights apart from any other's, for the key of its rows.
        open: a context manager that gives the model, ready to run.
    """

    name: str
    role: str
    identity: Any
    open: Callable[[], AbstractContextManager[Any]]


def entrants(
    student: Any,
    teacher: Any | None,
    *,
    names: tuple[str, str],
    identities: tuple[Any, Any],
    others: Sequence[Entrant] = (),
    seed: int = 0,
) -> list[Entrant]:
    """Teacher, student and every control that applies, in the order in which they are measured.

    Args:
        student: the given model.
        teacher: what it is compared with, or None.
        names: display names of the two.
        identities: of the two, see `Entrant.identity`.
        others: further controls, given as checkpoints.
        seed: of the untrained mixers.
    """
    others = _told_apart(others)
    name, teacher_name = names
    converted = surgery.converted(student)
    base = teacher if teacher is not None else None if converted else student
    base_identity = identities[1] if teacher is not None else identities[0]
    made = (
        []
        if teacher is None
        else [Entrant(teacher_name, TEACHER, identities[1], lambda: nullcontext(teacher))]
    )
    made.append(Entrant(name, STUDENT, identities[0], lambda: nullcontext(student)))
    if any(layer.mixer.has_both_branches for layer in converted):
        for role, branch in ((NO_LINEAR, "linear"), (NO_WINDOW, "window")):
            made.append(Entrant(name, role, [identities[0], branch], partial(_branch_off, student, branch)))
    if base is None or surgery.converted(base):
        return [*made, *others]
    if converted:
        plan = upgraded(student.config.linearize)
        given = {path: numbers["mixer"] for path, numbers in plan["layers"].items()}
        sections = list(plan["mixers"].values())
        what = [*sections, sorted(given)] if len(sections) == 1 else [plan["mixers"], given]
        made.append(
            Entrant(
                name,
                UNTRAINED,
                [base_identity, *what, seed],
                lambda: swapped(base, *layout(base, plan), seed=seed),
            )
        )
    sinks = compose(SINKS)
    if _can(base, sinks.mixer):
        made.append(
            Entrant(
                name,
                SINKS,
                [base_identity, sinks.mixer],
                lambda: swapped(base, sinks.mixer, "all", seed=seed),
            )
        )
    return [*made, *others]


def _told_apart(others: Sequence[Entrant]) -> list[Entrant]:
    """Roles tell rows apart: folders of one name, or of the name of a role, get a number."""
    taken, made = {STUDENT, TEACHER, *CONTROLS}, []
    for entrant in others:
        tries = (f"{entrant.role} ({number})" for number in itertools.count(2))
        role = next(role for role in itertools.chain([entrant.role], tries) if role not in taken)
        taken.add(role)
        made.append(replace(entrant, role=role))
    return made


@contextmanager
def swapped(
    model: Any, mixer: dict[str, Any], layers: Any, mixers: dict[str, Any] | None = None, *, seed: int = 0
) -> Iterator[Any]:
    """A converted model over the same weights, with fresh mixers; the given model stays as it is.

    Args:
        model: not converted.
        mixer, layers, mixers: as `surgery.convert` takes them.
        seed: of the mixers.
    """
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield surgery.convert(sharing(model), mixer, layers, mixers).to(device).eval()


def sharing(model: nn.Module) -> Any:
    """A copy with modules and config of its own, and the very same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@contextmanager
def _branch_off(model: Any, branch: str) -> Iterator[Any]:
    with surgery.branch_off(model, branch):
        yield model


def layout(model: Any, plan: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A checkpoint's plan as the `mixer`, `layers` and `mixers` that `surgery.convert` takes.

    Args:
        model: what was converted.
        plan: `config.linearize`.
    """
    paths, found = plan["layers"], surgery.attention_layers(model)
    given = {layer.index: paths[layer.path]["mixer"] for layer in found if layer.path in paths}
    if len(given) != len(paths):
        raise LinearizeError(
            f"--against: {type(model).__name__} has {len(given)} of the {len(paths)} attention layers that were "
            "converted; name the model that the checkpoint was converted from"
        )
    wanted = {*given.values()} - {DEFAULT}
    mixers = {name: section for name, section in plan["mixers"].items() if name in wanted}
    use = {name: [index for index, own in given.items() if own == name] for name in mixers}
    kept = [layer.index for layer in found if layer.index not in given]
    # where no layer has the default it may be any
    return (
        plan["mixers"].get(DEFAULT, next(iter(plan["mixers"].values()))),
        {"keep": kept, "use": use},
        mixers,
    )


def _can(model: Any, mixer: dict[str, Any]) -> bool:
    """Whether a window can be hung into the model."""
    try:
        with swapped(model, mixer, "all"):
            return True
    except UnsupportedModelError as error:
        log.info("no control %s: %s", SINKS, error)
        return False
