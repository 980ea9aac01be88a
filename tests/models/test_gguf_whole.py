"""A GGUF file that holds or says more than transformers carries over is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from linearize.errors import CheckpointError, UnsupportedModelError
from linearize.models import load_config, resolve


def extended(
    source: Path,
    target: Path,
    keys: dict[str, object] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """The file with other keys and more tensors."""
    reader, keys = GGUFReader(source), keys or {}
    writer = GGUFWriter(str(target), "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture" and key not in keys:
            kind = field.types[0]
            writer.add_key_value(
                key, field.contents(), kind, field.types[-1] if kind == GGUFValueType.ARRAY else None
            )
    for key, value in keys.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        writer.add_key_value(key, value, GGUFValueType.UINT32 if whole else GGUFValueType.get_type(value))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_q.bias", 32),
        ("blk.0.attn_q_norm.weight", 8),
        ("blk.1.attn_sinks.weight", 4),
        ("blk.1.post_ffw_norm.weight", 32),
        ("output.bias", 262),
        ("blk.1.secret.weight", (32, 32)),
    ],
)
def test_a_tensor_without_a_place_is_refused(gguf, tmp_path, name, shape):
    file = extended(gguf, tmp_path / "other.gguf", tensors={name: np.ones(shape, np.float32)})
    with pytest.raises(UnsupportedModelError, match=rf"no place for 1 of its tensors \({name}\)"):
        resolve(str(file))


def test_a_head_of_its_own_has_a_place(gguf, tmp_path):
    head = np.ones((262, 32), np.float32)
    file = extended(gguf, tmp_path / "other.gguf", tensors={"output.weight": head})
    assert (resolve(str(file)) / "config.json").is_file()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.scaling.factor", 4.0),
        ("rope.scale_linear", 4.0),
        ("rope.freq_base_swa", 500.0),
        ("rope.dimension_count", 4),
        ("attention.scale", 0.75),
        ("attention.clamp_kqv", 0.0625),
        ("attention.max_alibi_bias", 8.0),
        ("attention.causal", False),
        ("logit_scale", 4.0),
        ("residual_scale", 0.5),
        ("embedding_scale", 4.0),
        ("use_parallel_residual", True),
        ("expert_count", 4),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("never_heard_of", 1.0),
    ],
)
def test_a_key_that_changes_the_model_is_refused(gguf, tmp_path, key, value):
    file = extended(gguf, tmp_path / "other.gguf", {f"llama.{key}": value})
    with pytest.raises(UnsupportedModelError, match=rf"says {key}: {value}, which"):
        load_config(str(file))


def test_keys_that_say_what_the_model_does_anyway(gguf, tmp_path):
    neutral = {
        "rope.scaling.type": "none",
        "rope.scaling.factor": 1.0,
        "rope.scaling.original_context_length": 64,
        "rope.scaling.finetuned": False,
        "attention.scale": 8**-0.5,
        "attention.clamp_kqv": 0.0,
        "attention.max_alibi_bias": 0.0,
        "attention.causal": True,
        "attention.key_length": 8,
        "logit_scale": 1.0,
        "use_parallel_residual": False,
        "expert_count": 0,
        "final_logit_softcapping": 0.0,
        "tensor_data_layout": "Meta AI original pth",
    }
    file = extended(gguf, tmp_path / "other.gguf", {f"llama.{key}": value for key, value in neutral.items()})
    assert load_config(str(file)).hidden_size == 32


def test_a_special_token_outside_the_vocabulary(gguf, tmp_path):
    file = extended(gguf, tmp_path / "other.gguf", {"tokenizer.ggml.bos_token_id": 9999})
    with pytest.raises(
        CheckpointError, match=r"bos_token_id 9999, and its vocabulary holds the tokens 0 to 261"
    ):
        load_config(str(file))
