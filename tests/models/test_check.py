"""A checkpoint that is not whole is refused, with the file, the reason and the remedy."""

from __future__ import annotations

import json
import struct

import pytest

from linearize.errors import CheckpointError
from linearize.models import resolve
from linearize.models.shards import check_shard


def shards(checkpoint):
    return sorted(checkpoint.glob("*.safetensors"))


@pytest.mark.parametrize("lost", [1, 100])
def test_a_truncated_shard(checkpoint, lost):
    shard = shards(checkpoint)[-1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-lost])
    message = (
        rf"{shard.name} is corrupt or truncated: .* {len(content) - lost:,} bytes, .* {len(content):,}; fetch"
    )
    with pytest.raises(CheckpointError, match=message):
        resolve(str(checkpoint))


@pytest.mark.parametrize("size", [0, 5, 8, 40])
def test_a_shard_cut_inside_its_header(checkpoint, size):
    shard = shards(checkpoint)[0]
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=rf"{shard.name} is corrupt or truncated.*fetch it again"):
        resolve(str(checkpoint))


@pytest.mark.parametrize("header", [b"not json", b"[1, 2]", b'{"w": {}}', b'{"w": {"data_offsets": "?"}}'])
def test_a_damaged_header(checkpoint, header):
    shard = shards(checkpoint)[0]
    shard.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match=f"{shard.name} is corrupt"):
        resolve(str(checkpoint))


def test_a_header_of_absurd_length(checkpoint):
    shard = shards(checkpoint)[0]
    shard.write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match=f"{shard.name} is corrupt"):
        resolve(str(checkpoint))


def test_a_missing_shard(checkpoint):
    shard = shards(checkpoint)[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"incomplete: .* names {shard.name}, which is missing"):
        resolve(str(checkpoint))


def test_a_shard_from_elsewhere(checkpoint):
    first, second = shards(checkpoint)[:2]
    first.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match=rf"{first.name} lacks \d+ of the tensors"):
        resolve(str(checkpoint))


def test_only_pickles(checkpoint):
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"only pickle weights \(pytorch_model.bin\).*convert them"):
        resolve(str(checkpoint))


def test_no_weights(checkpoint):
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        resolve(str(checkpoint))


def test_shards_without_their_index(checkpoint):
    (checkpoint / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"has neither model.safetensors nor"):
        resolve(str(checkpoint))


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"weight_map": {}}), "\udcff"])
def test_a_damaged_index(checkpoint, content):
    path = checkpoint / "model.safetensors.index.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        resolve(str(checkpoint))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F999", "shape": [2], "data_offsets": [0, 8]}, "is of dtype 'F999'"),
        (
            {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 8]},
            r"of shape .* takes 4,000,000,000,000,000,000 bytes",
        ),
        ({"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}, r"has the shape \[-1, -2\]"),
        ({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}, "has the shape"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, r"lies at \[8, 0\]"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "begins at byte 4 and not at 0"),
        ({"dtype": "F32", "shape": [2]}, "lies at None"),
    ],
)
def test_a_header_that_describes_what_cannot_be(tmp_path, entry, message):
    header = json.dumps({"w": entry}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
    with pytest.raises(CheckpointError, match=rf"corrupt or truncated: tensor w {message}"):
        check_shard(file)


def test_tensors_that_overlap(tmp_path):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"w": entry, "v": {**entry, "data_offsets": [4, 12]}}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
    with pytest.raises(CheckpointError, match="tensor v begins at byte 4 and not at 8"):
        check_shard(file)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../other/model.safetensors", "outside the checkpoint's folder"),
        ("/etc/x.safetensors", "outside the checkpoint's folder"),
        ("..\\x.safetensors", "outside the checkpoint's folder"),
        ("C:/x.safetensors", "outside the checkpoint's folder"),
        ("a/../../x.safetensors", "outside the checkpoint's folder"),
        ("/etc/passwd", "names no safetensors file"),
        ("pytorch_model.bin", "names no safetensors file"),
        ("a\0.safetensors", "names no safetensors file"),
        (3, "names no safetensors file"),
        (None, "names no safetensors file"),
        (["a"], "names no safetensors file"),
    ],
)
def test_an_index_that_leads_elsewhere(checkpoint, name, message):
    path = checkpoint / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"index\.json: lm_head\.weight lies in .*{message}"):
        resolve(str(checkpoint))
