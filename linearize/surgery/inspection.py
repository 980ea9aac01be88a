"""Find a model's attention layers and read their numbers off a probing forward: no per-family code."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from linearize.errors import UnsupportedModelError
from linearize.mixers import LayerShape
from linearize.mixers.rotations import HALF, candidates, is_pair, rotate_back
from linearize.surgery import arguments, rotation
from linearize.surgery.probe import (
    FAILURES,
    Call,
    Probe,
    Visit,
    evaluating,
    made_elsewhere,
    place,
    probe,
    recording,
)


@dataclass
class AttentionLayer:
    """One attention layer of a model.

    Attributes:
        index: the layer's number, as caches count.
        path: name of the module inside the model.
        module: the module itself.
        shape: its numbers.
        ways: every value of `shape.rotary` that its queries agree with; empty where they show nothing.
    """

    index: int
    path: str
    module: nn.Module
    shape: LayerShape
    ways: tuple[str, ...] = ()


def attention_layers(model: PreTrainedModel) -> list[AttentionLayer]:
    """Every self-attention layer of a causal language model, in order.

    Args:
        model: any decoder of transformers, loaded or on the meta device.

    Raises:
        UnsupportedModelError: the attention is not reached through transformers' attention interface, is not causal,
            or uses something that no mixer computes; the message names the module and the reason.
    """
    modules = _attention_modules(model)
    seen = probe(model, [module for _, module in modules])
    own = probe(model, [module for _, module in modules], own=True)
    loaded = not next(model.parameters()).is_meta
    layers: list[AttentionLayer] = []
    # encoders of images and sound, attention to an encoder's output: text does not come by, and they stay as they are
    read = [(path, module) for path, module in modules if seen.visits.get(id(module))]
    for path, module in read or modules:
        refused = _not_causal(module) or _refusal(module, seen, own)
        shape = None if refused else _shape(model, module, seen, loaded=loaded)
        if shape is None or isinstance(shape, str):
            raise UnsupportedModelError(f"{path} ({type(module).__name__}): {refused or shape}")
        index = getattr(module, "layer_idx", None)
        visit = seen.visits[id(module)][0]
        ways = _ways(visit.calls[0], visit.rotation) if _shows(visit, loaded=loaded) else ()
        layers.append(AttentionLayer(len(layers) if index is None else index, path, module, shape, ways))
    _check_cache(model, layers)
    return sorted(layers, key=lambda layer: layer.index)


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config without weights, on the meta device.

    Raises:
        UnsupportedModelError: transformers has no causal language model for this config, or cannot build it.
    """
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except (*FAILURES, ImportError) as error:
        name = getattr(config, "model_type", type(config).__name__)
        if isinstance(error, ImportError):
            needs = " ".join(str(error).split())[:300]
            raise UnsupportedModelError(f"a '{name}' model cannot be built here: {needs}") from error
        if "for this kind of AutoModel" in str(error):
            raise UnsupportedModelError(
                f"a '{name}' model has no causal language model in transformers; give a decoder"
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsupportedModelError(
            f"a '{name}' model cannot be built from this config ({place(error)}: {reason}); compare it with the "
            "config.json of the model's publisher"
        ) from error


def _attention_modules(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    classes = _recorded_classes(model)
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, classes) and not getattr(module, "is_cross_attention", False)
    ]
    if not found:
        kinds = ((path, type(module).__name__) for path, module in model.named_modules())
        named = [f"{path} ({kind})" for path, kind in kinds if "attention" in kind.lower()]
        raise UnsupportedModelError(
            f"{named[0] if named else type(model).__name__}: no softmax attention that goes through transformers' "
            "attention interface, so its queries and keys cannot be reached; convert a family that does "
            "(Llama, Qwen, Gemma, GPT-2, ...)"
        )
    return found


def _not_causal(module: nn.Module) -> str | None:
    """Why a module is no decoder's, as far as it and its config say, or None.

    transformers makes masks by the config's word, whatever the module says; without weights no mask tells.
    """
    said = (getattr(module, "is_causal", True), getattr(getattr(module, "config", None), "is_causal", True))
    return "not causal (is_causal=False); only decoders can be converted" if False in said else None


def _recorded_classes(model: PreTrainedModel) -> tuple[type[nn.Module], ...]:
    """The attention classes that transformers itself hooks to record attention weights."""
    classes: list[type[nn.Module]] = []
    for module in model.modules():
        recorders = getattr(module, "_can_record_outputs", None) or {}
        entry = recorders.get("attentions") if isinstance(recorders, dict) else None
        for item in entry if isinstance(entry, (list, tuple)) else [entry]:
            cls = getattr(item, "target_class", item)
            if isinstance(cls, type) and issubclass(cls, nn.Module):
                classes.append(cls)
    return tuple(dict.fromkeys(classes))


def _refusal(module: nn.Module, seen: Probe, own: Probe) -> str | None:
    """Why an attention module cannot be converted, as far as its calls tell, or None."""
    visits = seen.visits.get(id(module), [])
    calls = [call for visit in visits for call in visit.calls]
    if not calls:
        return (
            "its attention does not go through transformers' attention interface, so its queries and keys cannot be "
            "reached; convert a model family that does (Llama, Qwen, Gemma, GPT-2, ...)"
        )
    if len(visits) > 1:
        return (
            f"runs {len(visits)} times in one forward of the model (layers that share it, or cycles), so one mixer "
            "and one state would have to serve several layers"
        )
    if len(calls) > 1:
        return f"calls its attention function {len(calls)} times a forward, for which one state is not enough"
    # under its own name a family may take a way that it does not take under ours, and the other way round
    for visit in (*visits, *own.visits.get(id(module), [])):
        for call in visit.calls:
            why = arguments.refusal(call.arguments, tokens=call.query.shape[2], mask=call.mask)
            why = why or arguments.heads_refusal(call.mask) or arguments.bias_refusal(call.mask)
            if why is None and not made_elsewhere(call.mask, visit.given):
                why = "makes an attention mask of its own, so its attention depends on more than q, k, v and padding"
            if why is not None:
                return why
    return None


def _shape(model: nn.Module, module: nn.Module, seen: Probe, *, loaded: bool) -> LayerShape | str:
    """A layer's numbers, or why they do not make a layer that a mixer could stand in for.

    Args:
        model: that the layer stands in.
        module: the layer, which the probe has seen run once.
        seen: the probe.
        loaded: whether the model has its weights, so that numbers mean something.
    """
    visit = seen.visits[id(module)][0]
    call = visit.calls[0]
    _, heads, tokens, key_dim = call.query.shape
    if call.key.shape[2] != tokens or call.value.shape[1] != call.key.shape[1] or heads % call.key.shape[1]:
        return (
            f"queries {tuple(call.query.shape)} and keys {tuple(call.key.shape)} do not form groups of heads"
        )
    try:
        numbers = arguments.numbers(call.arguments, key_dim)
    except ValueError as error:
        return str(error)
    local, chunk = seen.local_size(call.mask), None
    if local is not None and local != numbers["sliding_window"]:
        if not _in_chunks(module):
            return f"attends within a window of {local} tokens that its attention mask alone knows of"
        chunk = local
    if loaded and not bool(call.query.isfinite().all()):
        return "its queries are not finite; the weights hold NaN or infinite values"
    shape = LayerShape(
        heads=heads,
        kv_heads=call.key.shape[1],
        key_dim=key_dim,
        value_dim=call.value.shape[3],
        chunk=chunk,
        model_dim=visit.hidden_states.shape[-1],
        **numbers,
    )
    return dataclasses.replace(shape, **_turning(model, visit, loaded=loaded))


def _turning(model: nn.Module, visit: Visit, *, loaded: bool) -> dict[str, Any]:
    """`rotary` and `turns` of a layer, of which the second is known of queries that show a rotation alone."""
    shown = _shows(visit, loaded=loaded)
    made: dict[str, Any] = {"rotary": _rotary(visit.calls[0], visit.rotation, shown=shown)}
    made["turns"] = rotation.turns(model, visit, made["rotary"]) if shown else None
    return made


def rotations(
    model: PreTrainedModel, modules: list[nn.Module], run: Callable[[], Any]
) -> list[dict[str, Any]]:
    """How queries are turned in some layers that have their weights: what `LayerShape` says of it, by name.

    Args:
        model: that they stand in; other layers may have none.
        modules: attention modules.
        run: a pass over a few tokens that runs them.
    """
    seen = Probe()
    with (
        recording(model, modules, seen, own=False),
        evaluating(model),
        torch.no_grad(),
    ):
        run()
    return [_turning(model, seen.visits[id(module)][0], loaded=True) for module in modules]


def _in_chunks(module: nn.Module) -> bool:
    """Whether transformers' name for the layer's kind says that it attends within chunks, and not in a window."""
    kinds, index = getattr(module.config, "layer_types", None), getattr(module, "layer_idx", None)
    return kinds is not None and index is not None and kinds[index] == "chunked_attention"


def _check_cache(model: PreTrainedModel, layers: list[AttentionLayer]) -> None:
    """Hold the layers against the cache that generation will make: each needs a place of its own in it.

    Raises:
        UnsupportedModelError: a layer has no number, shares another one's, or keeps no keys and values.
    """
    taken: dict[int, str] = {}
    try:
        places = DynamicCache(config=model.config).layers
    except (AttributeError, KeyError, TypeError, ValueError):
        places = []  # a family with a cache of its own, which is none of transformers' layers
    for layer in layers:
        why = None
        if layer.index in taken:
            why = f"has the cache index {layer.index}, as {taken[layer.index]} has; their states would mix"
        elif layer.index < 0:
            why = f"has the cache index {layer.index}: it is told at each call which layer it is"
        elif places and not (layer.index < len(places) and isinstance(places[layer.index], CacheLayerMixin)):
            why = (
                "has no keys and values of its own in the model's cache: it uses those of an earlier layer "
                "(shared KV), which a state does not keep"
            )
        if why is not None:
            raise UnsupportedModelError(f"{layer.path} ({type(layer.module).__name__}): {why}")
        taken[layer.index] = layer.path


def _shows(visit: Visit, *, loaded: bool) -> bool:
    """Whether a layer's queries say how they were rotated: there are weights, and they are not zero."""
    return loaded and bool(visit.calls[0].query.any())


def _rotary(call: Call, rotation: Any, *, shown: bool) -> str:
    """How the probe's queries [1, H, T, K] were rotated.

    Without weights, or of queries that are zero (not `shown`), a pair of cos and sin is taken for that of rotate-half.
    """
    if not shown:
        return "none" if rotation is None else HALF if is_pair(rotation) else "other"
    return next(iter(_ways(call, rotation)), "other")


def _ways(call: Call, rotation: Any) -> tuple[str, ...]:
    """Every way in which the probe's queries [1, H, T, K] may have been rotated, "none" first.

    Every token is the same, so the queries differ by their rotation alone: rotating back must make them equal.
    """
    query = call.query.float().transpose(1, 2)
    near = 1e-2 * query.abs().max().item()

    def equal(x: torch.Tensor) -> bool:
        return torch.allclose(x, x[:, :1], atol=near, rtol=0.0)

    found = ["none"] if equal(query) else []
    found += [
        name for name in candidates(rotation, query.shape[-1]) if equal(rotate_back(query, rotation, name))
    ]
    return tuple(found)
