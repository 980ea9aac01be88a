"""Switches on a converted model: teacher or student, attention transfer, one branch off, untrained mixers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.mixers import BRANCHES
from linearize.registry import closest
from linearize.surgery.attention import Switch
from linearize.surgery.layer_call import LayerCall
from linearize.surgery.model import converted


def _switch(model: nn.Module) -> Switch:
    layers = converted(model)
    if not layers:
        kind = type(model).__name__
        raise LinearizeError(f"{kind} has no converted layer; call linearize.surgery.convert first")
    return layers[0].linearize_switch


@contextmanager
def mode(model: nn.Module, name: str) -> Iterator[None]:
    """Run converted layers as `student` (mixers) or `teacher` (the original attention function, bit-equal) inside.

    The teacher uses the current projections: with a LoRA adapter active it is not the original model.
    """
    if name not in ("student", "teacher"):
        raise LinearizeError(f"mode '{name}': {closest(name, ['student', 'teacher'])}")
    switch = _switch(model)
    before, switch.mode = switch.mode, name
    try:
        yield
    finally:
        switch.mode = before


@contextmanager
def observe(model: nn.Module, observer: Callable[[LayerCall], Tensor | None]) -> Iterator[None]:
    """Attention transfer: inside, each converted layer runs the teacher and shows itself to `observer`.

    The teacher's output is what goes on to the next layer, so no graph spans layers; an observer that gives back a
    tensor of its shape [B, T, H, V] sends that one on.
    """
    switch = _switch(model)
    before = switch.mode, switch.observer
    switch.mode, switch.observer = "observe", observer
    try:
        yield
    finally:
        switch.mode, switch.observer = before


@contextmanager
def as_teacher_layers(model: nn.Module, numbers: Collection[int]) -> Iterator[None]:
    """Inside, these converted layers run as the teacher, bit-equal, and the others as before.

    They have a switch of their own meanwhile, so `mode`, `observe` and `trusting` belong outside of this block. For
    passes without a cache: one that is made inside would take all layers for students.

    Args:
        model: a converted model, under any wrapper.
        numbers: of the layers, as the model counts them.

    Raises:
        LinearizeError: one of them is no converted layer.
    """
    shared, layers = _switch(model), converted(model)
    missing = sorted(set(numbers) - {layer.layer_idx for layer in layers})
    if missing:
        raise LinearizeError(f"layer {missing[0]} is not converted, so it cannot be switched to the teacher")
    own = Switch()
    own.mode, own.trusts = "teacher", shared.trusts
    chosen = [layer for layer in layers if layer.layer_idx in numbers]
    before = [layer.linearize_switch for layer in chosen]
    for layer in chosen:
        layer.linearize_switch = own
    try:
        yield
    finally:
        for layer, switch in zip(chosen, before, strict=True):
            layer.linearize_switch = switch


@contextmanager
def trusting(model: nn.Module) -> Iterator[None]:
    """Inside, converted layers take masks at their word and suppose that no token is padding: nothing waits.

    For batches like others that have been checked, such as the next ones of a packed data set.
    """
    switch = _switch(model)
    before, switch.trusts = switch.trusts, True
    try:
        yield
    finally:
        switch.trusts = before


@contextmanager
def branch_off(model: nn.Module, branch: str) -> Iterator[None]:
    """Inside, one branch (`window` or `linear`) contributes nothing in every layer that has both.

    Raises:
        LinearizeError: no such branch, or no layer with two branches.
    """
    if branch not in BRANCHES:
        raise LinearizeError(f"branch '{branch}': {closest(branch, BRANCHES)}")
    mixers = [layer.mixer for layer in converted(model) if layer.mixer.has_both_branches]
    if not mixers:
        raise LinearizeError(
            f"branch '{branch}' cannot be switched off: no layer has both a window and a linear branch"
        )
    for mixer in mixers:
        mixer.branch_off = branch
    try:
        yield
    finally:
        for mixer in mixers:
            mixer.branch_off = None


def reset_mixers(model: nn.Module) -> None:
    """Every mixer back to its initial values."""
    for layer in converted(model):
        for parameter in layer.mixer.parameters():
            if hasattr(parameter, "_is_hf_initialized"):
                del parameter._is_hf_initialized
        layer.mixer.reset_parameters()


@contextmanager
def fresh_mixers(model: nn.Module) -> Iterator[None]:
    """Inside, the mixers are at their initial values; the trained ones return afterwards."""
    mixers = [layer.mixer for layer in converted(model)]
    kept = [{name: value.clone() for name, value in mixer.state_dict().items()} for mixer in mixers]
    reset_mixers(model)
    try:
        yield
    finally:
        for mixer, values in zip(mixers, kept, strict=True):
            mixer.load_state_dict(values)


def mixer_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters of all mixers, under their names in the unwrapped model."""
    named = {id(parameter): parameter for layer in converted(model) for parameter in layer.mixer.parameters()}
    wrapper: Any = model
    base: nn.Module = wrapper.get_base_model() if hasattr(model, "get_base_model") else model
    return {name: parameter for name, parameter in base.named_parameters() if id(parameter) in named}


def load_mixer_state(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy mixer parameters in; every one must be there.

    Raises:
        LinearizeError: names differ.
    """
    own = mixer_state(model)
    if own.keys() != tensors.keys():
        differing = sorted(own.keys() ^ tensors.keys())[:3]
        raise LinearizeError(f"mixer parameters do not match the model: {', '.join(differing)}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
