"""flash-linear-attention's layout (fla 0.6): config.json and safetensors that its AutoModelForCausalLM loads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor

from linearize.errors import UnsupportedModelError
from linearize.export.layouts.body import Body
from linearize.export.layouts.choice import is_recurrent, nearest
from linearize.export.layouts.difference import Difference
from linearize.export.layouts.fla_attention import (
    Transformer,
    attention_differences,
    attention_entry,
    softmax_differences,
)
from linearize.export.layouts.fla_delta import DeltaNet, GatedDeltaNet
from linearize.export.layouts.fla_gla import GLA
from linearize.export.layouts.fla_gsa import GSA
from linearize.export.layouts.fla_rwkv7 import RWKV7
from linearize.export.layouts.layer import ForeignLayer, Given
from linearize.export.layouts.source import Source, refused

LAYERS: tuple[ForeignLayer, ...] = (GLA(), GatedDeltaNet(), DeltaNet(), GSA(), RWKV7())
TRANSFORMER = Transformer()
CLASSES = {
    "transformer": "TransformerForCausalLM",
    "gla": "GLAForCausalLM",
    "delta_net": "DeltaNetForCausalLM",
    "gated_deltanet": "GatedDeltaNetForCausalLM",
}
OUTSIDE = {
    "model.embed_tokens.weight": "model.embeddings.weight",
    "model.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
INSIDE = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "mlp_norm.weight",
    "mlp.gate_proj.weight": "mlp.gate_proj.weight",
    "mlp.up_proj.weight": "mlp.up_proj.weight",
    "mlp.down_proj.weight": "mlp.down_proj.weight",
}


def compare(givens: Sequence[Given], body: Body) -> tuple[ForeignLayer, list[Difference]]:
    """The fla layer that is nearest to some mixers, and what differs; see `choice.nearest`."""
    softmax = partial(attention_differences, body=body)
    candidates = LAYERS if any(map(is_recurrent, givens)) else (TRANSFORMER,)
    return nearest(candidates, givens, softmax)


def write(source: Source, folder: Path) -> str:
    """Write config.json and the weights into a folder.

    A folded weight becomes float32, every other tensor keeps its dtype.

    Args:
        source: the checkpoint.
        folder: an existing one.

    Returns:
        What the layout is, for people.

    Raises:
        UnsupportedModelError: lists everything that differs from the nearest layer of fla.
    """
    layer, differences = compare([one.given for one in source.layers.values()], source.body)
    recurrent = {index: one for index, one in source.layers.items() if is_recurrent(one.given)}
    differences += [one for given in recurrent.values() for one in layer.found(given)]
    differences += [one for shape in source.kept.values() for one in softmax_differences(shape, source.body)]
    softmax = {
        index: source.projections(index) for index in range(source.body.layers) if index not in recurrent
    }
    if any("o.bias" in weights for weights in softmax.values()):
        differences.append(Difference("body", "a bias on the o projection", "none"))
    entries = _entries(source, softmax)
    if layer is TRANSFORMER and len(entries) > 1:
        differences.append(Difference("layers", "windows of several sizes", "one in every layer"))
    if differences:
        raise UnsupportedModelError(refused(source.folder, "fla", f"fla's {layer.name}", differences))
    tensors: dict[str, Tensor] = {}
    for name, theirs in OUTSIDE.items():
        if name in source.tensors and not (source.body.tied and name == "lm_head.weight"):
            tensors[theirs] = source.tensors[name]
    for index in range(source.body.layers):
        place = f"model.layers.{index}"
        for name, theirs in INSIDE.items():
            tensors[f"{place}.{theirs}"] = source.tensors[f"{place}.{name}"]
        made = layer.tensors(recurrent[index]) if index in recurrent else _softmax(softmax[index])
        tensors |= {f"{place}.attn.{name}": value for name, value in made.items()}
    save_torch_state_dict({name: value.contiguous() for name, value in tensors.items()}, folder)
    settings = layer.settings(next(iter(recurrent.values())).given) if recurrent else entries[0]
    config = _config(source.body, layer, {"attn": entries or None, **settings} if recurrent else settings)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return f"fla's {layer.name} (model_type {layer.model})"


def _softmax(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a softmax layer; where one of q, k and v has a bias, all have."""
    made = {f"{role}_proj.weight": weights[role] for role in "qkvo"}
    if any(role.endswith(".bias") for role in weights):
        for role in "qkv":
            bias = weights.get(f"{role}.bias")
            made[f"{role}_proj.bias"] = weights[role].new_zeros(len(weights[role])) if bias is None else bias
    return made


def _entries(source: Source, softmax: dict[int, dict[str, Tensor]]) -> list[dict[str, Any]]:
    """`attn` of a config: numbers of the softmax layers, and which layers have them."""
    entries: list[dict[str, Any]] = []
    for index, weights in softmax.items():
        converted = source.layers.get(index)
        section = None if converted is None else converted.given.mixer["window"]
        window = section["size"] if section is not None and section["name"] == "sliding" else None
        shape = source.kept[index] if converted is None else converted.given.shape
        biased = any(role.endswith(".bias") for role in weights)
        entry = attention_entry(shape, source.body, window, biased)
        same = next((one for one in entries if {**one, "layers": []} == {**entry, "layers": []}), None)
        if same is None:
            entries.append({"layers": [index], **entry})
        else:
            same["layers"].append(index)
    return entries


def _config(body: Body, layer: ForeignLayer, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": [CLASSES[layer.model]],
        "model_type": layer.model,
        "dtype": body.dtype,
        **body.tokens,
        "vocab_size": body.vocabulary,
        "hidden_size": body.hidden,
        "intermediate_size": body.intermediate,
        "num_hidden_layers": body.layers,
        "hidden_act": "swish",
        "norm_eps": body.eps,
        "tie_word_embeddings": body.tied,
        "max_position_embeddings": body.longest,
        **{key: value for key, value in settings.items() if key != "layers"},
    }
