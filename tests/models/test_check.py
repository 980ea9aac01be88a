"""A checkpoint that is not whole is refused, with the file, the reason and the remedy."""

from __future__ import annotations

import json
import struct

import pytest

from linearize.errors import CheckpointError
from linearize.models import resolve


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
