"""Weights that are written one by one are the files that transformers writes."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_llama import tiny_llama
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from linearize.export import streamed
from linearize.export.reloading import fingerprints


def test_the_same_files(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    model.config.save_pretrained(tmp_path / "own")
    held, asked = model.state_dict(), []

    def tensor(name: str) -> torch.Tensor:
        asked.append(name)
        return held[name]

    like = {name: tensor.to("meta") for name, tensor in held.items()}
    found = streamed.write(tmp_path / "own", tensor, like, writes=True, max_shard_size="20KB")
    assert found == fingerprints(model) and sorted(asked) == sorted(held)
    indices = [json.loads((tmp_path / name / streamed.INDEX).read_text()) for name in ("whole", "own")]
    assert indices[0] == indices[1] and len(set(indices[0]["weight_map"].values())) > 3
    for file in set(indices[0]["weight_map"].values()):
        one, other = (load_file(tmp_path / name / file) for name in ("whole", "own"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    assert fingerprints(loaded) == fingerprints(model)


def test_who_does_not_write_asks_all_the_same(tmp_path: Path) -> None:
    held, asked = tiny_llama().state_dict(), []
    like = {name: tensor.to("meta") for name, tensor in held.items()}
    streamed.write(tmp_path, lambda name: asked.append(name) or held[name], like, writes=False)  # type: ignore[func-returns-value]
    assert sorted(asked) == sorted(held) and not list(tmp_path.iterdir())


def test_a_full_disk_is_said_after_all_have_been_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, asked = tiny_llama().state_dict(), []
    like = {name: tensor.to("meta") for name, tensor in held.items()}

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(streamed, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        streamed.write(
            tmp_path,
            lambda name: asked.append(name) or held[name],  # type: ignore[func-returns-value]
            like,
            writes=True,
            max_shard_size="20KB",
        )
    assert sorted(asked) == sorted(held)
