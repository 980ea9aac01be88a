"""A GGUF file that holds or says more than transformers carries over is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from linearize.errors import UnsupportedModelError
from linearize.models import resolve


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
