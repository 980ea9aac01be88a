"""Find a model's attention layers and read their numbers off one probing forward: no per-family code.

Since transformers 5 every attention module hands q, k, v (after q/k norm and RoPE) to a registered function. A probe
registered there sees the shapes, the scaling, the soft cap and the sliding window of each layer, on the meta device
as well as on a loaded model.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from linearize.errors import UnsupportedModelError
from linearize.mixers import LayerShape
from linearize.mixers.position import rotate_back

PROBE = "linearize_probe"

UNDERSTOOD = {
    "sliding_window",
    "softcap",
    "position_ids",
    "use_cache",
    "is_causal",
    "output_attentions",
    "position_embeddings",
}
"""Extra arguments of attention functions that a mixer honors or that do not change the result."""

CHANGES_RESULT = {"s_aux": "learned attention sinks", "position_bias": "a position bias", "alibi": "ALiBi"}
"""Extra arguments that no mixer computes yet."""


@dataclass
class AttentionLayer:
    """One attention layer of a model.

    Attributes:
        index: the layer's number, as caches count.
        path: name of the module inside the model.
        module: the module itself.
        shape: its numbers.
    """

    index: int
    path: str
    module: nn.Module
    shape: LayerShape


def attention_layers(model: PreTrainedModel) -> list[AttentionLayer]:
    """Every self-attention layer of a causal language model, in order.

    Args:
        model: any decoder of transformers, loaded or on the meta device.

    Raises:
        UnsupportedModelError: the attention is not reached through transformers' attention interface, is not causal,
            or uses something that no mixer computes; the message names the module and the reason.
    """
    modules = _attention_modules(model)
    seen = _probe(model, [module for _, module in modules])
    layers: list[AttentionLayer] = []
    for path, module in modules:
        shape = seen.get(id(module))
        if shape is None:
            raise UnsupportedModelError(
                f"{path} ({type(module).__name__}): its attention does not go through transformers' attention "
                "interface, so its queries and keys cannot be reached; convert a model family that does "
                "(Llama, Qwen, Gemma, GPT-2, ...)"
            )
        if isinstance(shape, str):
            raise UnsupportedModelError(f"{path} ({type(module).__name__}): {shape}")
        index = getattr(module, "layer_idx", None)
        layers.append(AttentionLayer(len(layers) if index is None else index, path, module, shape))
    return sorted(layers, key=lambda layer: layer.index)


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config without weights, on the meta device.

    Raises:
        UnsupportedModelError: transformers has no causal language model for this config.
    """
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except ValueError as error:
        name = getattr(config, "model_type", type(config).__name__)
        raise UnsupportedModelError(
            f"{name}: not a causal language model of transformers ({error})"
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
    for path, module in found:
        if getattr(module, "is_causal", True) is False:
            raise UnsupportedModelError(
                f"{path} ({type(module).__name__}): not causal; only decoders can be converted"
            )
    return found


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


def _probe(model: PreTrainedModel, modules: list[nn.Module]) -> dict[int, LayerShape | str]:
    """id of each module that reached the attention interface -> its numbers, or why it cannot be converted."""
    seen: dict[int, LayerShape | str] = {}
    called: dict[int, tuple[Tensor, tuple[Tensor, Tensor] | None]] = {}

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        called[id(module)] = hidden, kwargs.get("position_embeddings")

    def record(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **extra: Any
    ) -> tuple[Tensor, None]:
        batch, heads, tokens, key_dim = query.shape
        unknown = [why for name, why in CHANGES_RESULT.items() if extra.get(name) is not None]
        if unknown:
            seen[id(module)] = f"uses {unknown[0]}, which no mixer computes yet"
        elif key.shape[2] != tokens or heads % key.shape[1]:
            seen[id(module)] = (
                f"queries {tuple(query.shape)} and keys {tuple(key.shape)} do not form groups of heads"
            )
        else:
            scaling = extra.get("scaling")
            seen[id(module)] = LayerShape(
                heads=heads,
                kv_heads=key.shape[1],
                key_dim=key_dim,
                value_dim=value.shape[3],
                scaling=float(key_dim**-0.5 if scaling is None else scaling),
                softcap=extra.get("softcap"),
                sliding_window=extra.get("sliding_window"),
                model_dim=called[id(module)][0].shape[-1],
                rotary=_rotary(query, called[id(module)][1]),
            )
        return query.new_zeros(batch, tokens, heads, value.shape[3]), None

    AttentionInterface.register(PROBE, record)
    AttentionMaskInterface.register(PROBE, lambda *args, **kwargs: None)
    owned = (getattr(module, "config", None) for module in model.modules())
    configs: dict[int, Any] = {id(config): config for config in owned if isinstance(config, PreTrainedConfig)}
    kept = {key: config._attn_implementation_internal for key, config in configs.items()}
    training = model.training
    hooks = [module.register_forward_pre_hook(remember, with_kwargs=True) for module in modules]
    try:
        for config in configs.values():
            config._attn_implementation_internal = PROBE
        device = next(model.parameters()).device
        ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
        model.eval()
        with torch.no_grad():
            # a ready-made 4D mask passes through transformers untouched, and so without looking at meta data
            mask = torch.zeros(1, 1, 2, 2, dtype=next(model.parameters()).dtype, device=device)
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__}: probing its attention with two tokens failed: {type(error).__name__}: {error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
        for key, config in configs.items():
            config._attn_implementation_internal = kept[key]
    return seen


def _rotary(query: Tensor, rotation: tuple[Tensor, Tensor] | None) -> str:
    """How the probe's queries [1, H, 2, K] were rotated.

    The probe sends one token twice through attention that adds nothing, so its two queries differ by their rotation
    alone, in every layer: rotating back must make them equal.
    """
    if rotation is None:
        return "none"
    if query.is_meta:
        return "half"
    first, second = query.float().transpose(1, 2).unbind(1)
    near = 1e-2 * first.abs().max().item()
    if torch.allclose(first, second, atol=near, rtol=0.0):
        return "none"
    back = rotate_back(query.float().transpose(1, 2), *(x.float() for x in rotation))
    return "half" if torch.allclose(back[:, 0], back[:, 1], atol=near, rtol=0.0) else "other"
