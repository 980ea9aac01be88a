"""Whether a call of `generate` can run in one CUDA graph, and what it asks for; if not, why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.generation import GenerationMode

from linearize.decode.masks import PATTERNS, patterns
from linearize.decode.sampling import Sampling
from linearize.surgery import converted

DEVICE = "cuda"
"""Where a graph can be captured."""
READ = {
    "max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "eos_token_id", "pad_token_id",
    "bos_token_id", "transformers_version", "disable_compile",
}  # fmt: skip
"""Fields of a generation config that are read here, or that change no token."""


@dataclass(frozen=True)
class Request:
    """What a call asks for.

    Attributes:
        tokens: most new tokens.
        sampling: how they are chosen.
        eos: tokens that end a row.
        pad: what an ended row goes on with.
    """

    tokens: int
    sampling: Sampling
    eos: tuple[int, ...]
    pad: int


def request(model: Any, prompt: int, options: dict[str, Any]) -> tuple[Request | None, list[str]]:
    """Read the options of `model.generate`, with transformers' defaults and the model's own generation config.

    Args:
        model: a causal language model of transformers, without `obstacles`.
        prompt: tokens of the prompt, padding included.
        options: keyword arguments of `generate` beside the prompt.

    Returns:
        The request and no problem, or None and what stands in the way, each a phrase.
    """
    try:
        config, unknown = model._prepare_generation_config(None, **options)
    except ValueError as error:
        return None, [" ".join(str(error).split())]
    problems = [f"option {name}" for name in sorted(unknown)]
    if config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        problems.append(f"{config.get_generation_mode().value.replace('_', ' ')}")
    own = "" if options.get("generation_config") is not None else ", of the model's generation_config.json"
    problems += [f"option {name}{'' if name in options else own}" for name in unread(config)]
    sampling = Sampling()
    if config.do_sample:
        top_p = 1.0 if config.top_p is None else config.top_p
        try:
            sampling = Sampling(True, config.temperature or 1.0, config.top_k or 0, top_p)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        return None, list(dict.fromkeys(problems))
    ends = config.eos_token_id
    eos = () if ends is None else tuple(ends) if isinstance(ends, list | tuple) else (int(ends),)
    pads = (config.pad_token_id, *eos, 0)
    tokens = config.max_length - prompt if config.max_new_tokens is None else config.max_new_tokens
    return Request(max(tokens, 0), sampling, eos, next(int(x) for x in pads if x is not None)), []


def unread(config: Any) -> dict[str, Any]:
    """Of a generation config of transformers what asks for something that is not among `READ`, by name."""
    usual = config._get_default_generation_params()
    return {
        name: value
        for name, value in vars(config).items()
        if name not in READ
        and not name.startswith("_")
        and value is not None
        and not _same(value, usual.get(name, False))
    }


def _same(value: Any, other: Any) -> bool:
    return value is other or (isinstance(value, bool | int | float | str) and value == other)


def obstacles(model: Any) -> list[str]:
    """What in the model keeps its steps from being one CUDA graph, each a phrase."""
    problems = []
    device = next(model.parameters()).device if isinstance(model, PreTrainedModel) else None
    if device is not None and device.type != DEVICE:
        problems.append(f"the model is on {device}, and CUDA graphs need a CUDA device")
    return problems + unknown_steps(model)


def unknown_steps(model: Any) -> list[str]:
    """What in the model keeps its steps from running on states of fixed size, on any device, each a phrase."""
    if not isinstance(model, PreTrainedModel):
        return [f"a {type(model).__name__} is not a model of transformers itself"]
    problems = []
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        problems.append("the model is spread over several devices")
    config = model.config.get_text_config()
    layers = converted(model)
    if layers and layers[0].linearize_switch.mode != "student":
        problems.append("the converted layers run as their teacher")
    chunked = [layer.layer_idx for layer in layers if layer.mixer.shape.chunk is not None]
    if chunked:
        problems.append(f"layers {_listed(chunked)} begin again at each chunk, which their masks tell")
    beside = [layer.layer_idx for layer in layers if layer.layer_idx in _beside(config)]
    if beside:
        problems.append(
            f"layers {_listed(beside)} keep states of a convolution or a recurrence beside their attention's"
        )
    if len(layers) < config.num_hidden_layers:
        if config._attn_implementation not in ("sdpa", "eager"):
            problems.append(f"softmax layers with the attention function {config._attn_implementation}")
        kinds = patterns(config)
        other = sorted({kinds} - set(PATTERNS) if isinstance(kinds, str) else set(kinds) - set(PATTERNS))
        if other:
            problems.append(f"layers of the kind {', '.join(other)}")
    return problems


def _beside(config: Any) -> set[int]:
    """Layers that hold more in transformers' cache than keys and values, which no converted layer of ours holds."""
    try:
        places = DynamicCache(config=config).layers
    except (AttributeError, KeyError, TypeError, ValueError):
        return set()  # a family with a cache of its own
    return {index for index, place in enumerate(places) if isinstance(place, LinearAttentionCacheLayerMixin)}


def fingerprint(model: Any) -> tuple[Any, ...]:
    """What a captured graph takes for granted: where the weights are, and how the converted layers are switched."""
    held = [(x.data_ptr(), x.dtype) for x in (*model.parameters(), *model.buffers())]
    switches = [(layer.linearize_switch.mode, layer.mixer.branch_off) for layer in converted(model)]
    attention = model.config.get_text_config()._attn_implementation
    return (*held, *switches, attention, torch.get_float32_matmul_precision())


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
