"""What a mixer asks of the layer around it beyond q, k and v, and whether the family's layer has it.

Told in a plan, before weights are loaded where a layer shows it without them, else as soon as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from linearize.errors import LinearizeError, UnsupportedModelError, collected
from linearize.mixers import LayerShape, Mixer, build, shift
from linearize.surgery import handed_on
from linearize.surgery.inspection import AttentionLayer
from linearize.surgery.model import body
from linearize.surgery.probe import probe

SHIFTS = "mixer.update.shift_projections"


def check(
    model: PreTrainedModel, chosen: list[tuple[AttentionLayer, dict[str, Any]]], errors: list[LinearizeError]
) -> None:
    """Refuse mixers where they cannot have what they ask for.

    Args:
        model: untouched, loaded or on the meta device.
        chosen: layers to be converted, each with the normalized section of its mixer.
        errors: receives UnsupportedModelError, one for each demand.
    """
    loaded = not next(model.parameters()).is_meta
    with torch.device("meta"):
        built = [(layer, build(section, layer.shape)) for layer, section in chosen]
    with collected(errors):
        # without weights a rotation is shown that a layer may not take (Llama 4's without positions)
        for layer, mixer in built if loaded else []:
            check_rotation(layer.path, layer.module, layer.shape, mixer)
    mixing = [layer for layer, mixer in built if mixer.uses_first]
    with collected(errors):
        _check_handing(model, mixing, loaded=loaded)
        handed_on.check([(_named(x.path, x.module), x.shape) for x, mixer in built if mixer.uses_first])
    with collected(errors):
        _check_shifts(model, [layer for layer, mixer in built if shift.shifts_projections(mixer)])


def check_rotation(path: str, module: nn.Module, shape: LayerShape, mixer: Mixer) -> None:
    """Refuse to take a rotation back that is of no known kind.

    Args:
        path, module: of an attention layer that was seen with its weights.
        shape: its numbers.
        mixer: that it gets, on any device.

    Raises:
        UnsupportedModelError: the rotation is another one, and the mixer asks for queries and keys as they were before.
    """
    if shape.rotary == "other" and mixer.needs_plain:
        raise UnsupportedModelError(
            f"{_named(path, module)}: how its rotary embedding turns queries and keys does not follow from what the "
            "layer is handed, so they cannot be rotated back; leave the rotation on in both branches "
            "(mixer.position={name: rope})"
        )


def _check_handing(model: PreTrainedModel, layers: list[AttentionLayer], *, loaded: bool) -> None:
    """Refuse values of the first layer where a family's blocks keep arguments from their attention.

    Raises:
        UnsupportedModelError: names the first such layer.
    """
    found: set[int] = set()

    def give(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, handed_on.NAME: None}

    def take(index: int) -> Callable[..., Any]:
        def taking(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            found.update([index] if handed_on.NAME in kwargs else [])
            return args, {name: x for name, x in kwargs.items() if name != handed_on.NAME}

        return taking

    if not layers:
        return
    hooks = [body(model).register_forward_pre_hook(give, with_kwargs=True)]
    hooks += [x.module.register_forward_pre_hook(take(x.index), with_kwargs=True) for x in layers]
    try:
        probe(model, [layer.module for layer in layers])
    except UnsupportedModelError:
        if not loaded:
            return  # some run with their weights alone
    finally:
        for hook in hooks:
            hook.remove()
    for layer in layers:
        if layer.index not in found:
            raise handed_on.missing(_named(layer.path, layer.module))


def _check_shifts(model: PreTrainedModel, layers: list[AttentionLayer]) -> None:
    """Refuse shifted projections where the attention writes more into the cache than keys and values.

    The attention's forward runs four times for a token then, and would write that as often, from other inputs.

    Raises:
        UnsupportedModelError: names the first such layer.
    """
    places = _places(model) if layers else []
    beside = (LinearAttentionCacheLayerMixin,)
    asked = [x for x in layers if x.index < len(places) and isinstance(places[x.index], beside)]
    owners = {cls for x in asked for cls in type(places[x.index]).__mro__} | {Cache}
    written = _writers(model, asked, owners) if asked else set()
    for layer in asked:
        if layer.index in written:
            raise UnsupportedModelError(
                f"{_named(layer.path, layer.module)}: its attention keeps the state of a convolution or a recurrence "
                f"beside keys and values, and cannot run on shifted inputs too; convert with {SHIFTS}=false"
            )


def _places(model: PreTrainedModel) -> list[Any]:
    """The layers of the cache that generation will make; none of a family with a cache of its own."""
    try:
        return DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    except (AttributeError, KeyError, TypeError, ValueError):
        return []


def _writers(model: PreTrainedModel, layers: list[AttentionLayer], owners: Iterable[type]) -> set[int]:
    """Which of the layers read or write such a state from within their attention; all where that cannot be seen."""
    running: list[int] = []
    found: set[int] = set()

    def entering(index: int) -> Callable[..., None]:
        return lambda *_: running.append(index)

    def leaving(*_: Any) -> None:
        running.clear()

    hooks = [x.module.register_forward_pre_hook(entering(x.index)) for x in layers]
    hooks += [x.module.register_forward_hook(leaving, always_call=True) for x in layers]
    try:
        with _watching(owners, lambda: found.update(running)):
            probe(model, [layer.module for layer in layers], cached=True)
    except UnsupportedModelError:
        return {layer.index for layer in layers}
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextmanager
def _watching(owners: Iterable[type], seen: Callable[[], None]) -> Iterator[None]:
    """Inside, `seen` is called whenever one of the owners is asked for the state of a convolution or a recurrence."""
    kept = [
        (cls, name, method)
        for cls in owners
        for name, method in vars(cls).items()
        if name.endswith("_state") and callable(method)
    ]

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            seen()
            return method(*args, **kwargs)

        return inner

    try:
        for cls, name, method in kept:
            setattr(cls, name, watched(method))
        yield
    finally:
        for cls, name, method in kept:
            setattr(cls, name, method)


def _named(path: str, module: nn.Module) -> str:
    return f"{path} ({type(module).__name__})"
