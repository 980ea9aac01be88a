"""llama.cpp's layout: one GGUF file of an architecture that computes the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.errors import UnsupportedModelError
from linearize.export.layouts.choice import nearest
from linearize.export.layouts.difference import Difference
from linearize.export.layouts.gguf_arwkv7 import ARWKV7
from linearize.export.layouts.gguf_rwkv6qwen2 import RWKV6Qwen2
from linearize.export.layouts.gguf_tokens import add_tokens
from linearize.export.layouts.layer import ForeignLayer, Given
from linearize.export.layouts.source import Source, refused

LAYERS: tuple[ForeignLayer, ...] = (ARWKV7(), RWKV6Qwen2())
INSIDE = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
UNBOUNDED = 1048576
"""Context length of a model whose state does not grow, as llama.cpp's own converter writes it."""


def compare(givens: Sequence[Given]) -> tuple[ForeignLayer, list[Difference]]:
    """The architecture that is nearest to some mixers, and what differs; see `choice.nearest`."""
    return nearest(LAYERS, givens, _no_softmax)


def write(source: Source, tokenizer: Any, file: Path) -> str:
    """Write a GGUF file.

    Vectors and what is folded or new are float32, every other tensor keeps its dtype.

    Args:
        source: the checkpoint.
        tokenizer: its tokenizer.
        file: where to.

    Returns:
        What the layout is, for people.

    Raises:
        UnsupportedModelError: lists everything that differs from the nearest architecture, or names the tokenizer.
    """
    from gguf import GGUFWriter

    layer, differences = compare([one.given for one in source.layers.values()])
    if not differences:
        differences += [one for given in source.layers.values() for one in layer.found(given)]
    if source.kept:
        differences.append(kept(str(len(source.kept))))
    if differences:
        raise UnsupportedModelError(refused(source.folder, "gguf", f"llama.cpp's {layer.name}", differences))
    body = source.body
    writer = GGUFWriter(file, layer.model)
    try:
        add_tokens(writer, tokenizer, body.vocabulary)
        writer.add_type("model")
        writer.add_vocab_size(body.vocabulary)
        writer.add_context_length(UNBOUNDED)
        writer.add_embedding_length(body.hidden)
        writer.add_block_count(body.layers)
        writer.add_feed_forward_length(body.intermediate)
        writer.add_layer_norm_rms_eps(body.eps)
        for key, value in layer.settings(source.layers[0].given).items():
            getattr(writer, f"add_{key}")(value)
        for name, tensor in _tensors(source, layer):
            _add(writer, name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return f"GGUF of llama.cpp's {layer.name}"


def kept(count: str) -> Difference:
    """What differs where some layers are still the teacher's softmax."""
    return Difference("layers", f"{count} of softmax attention", "a recurrence in every one")


def _no_softmax(given: Given) -> Iterator[Difference]:
    yield Difference(
        "layers", f"softmax alone ({given.mixer['window']['name']})", "a recurrence in every one"
    )


def _tensors(source: Source, layer: ForeignLayer) -> Iterator[tuple[str, Tensor]]:
    embeddings = source.tensors["model.embed_tokens.weight"]
    yield "token_embd.weight", embeddings
    yield "output_norm.weight", source.tensors["model.norm.weight"]
    yield "output.weight", embeddings if source.body.tied else source.tensors["lm_head.weight"]
    for index, converted in source.layers.items():
        for name, theirs in INSIDE.items():
            yield f"blk.{index}.{theirs}", source.tensors[f"model.layers.{index}.{name}"]
        for name, tensor in layer.tensors(converted).items():
            yield f"blk.{index}.{name}", tensor


def _add(writer: Any, name: str, tensor: Tensor) -> None:
    from gguf import GGMLQuantizationType

    matrix = tensor.dim() == 2
    if matrix and tensor.dtype == torch.bfloat16:
        codes = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, codes, raw_dtype=GGMLQuantizationType.BF16)
    elif matrix and tensor.dtype == torch.float16:
        writer.add_tensor(name, tensor.contiguous().numpy())
    else:
        writer.add_tensor(name, tensor.float().contiguous().numpy())
