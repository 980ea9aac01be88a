"""What vLLM reads of a checkpoint's layers, and that the family's own code gets its config back."""

from __future__ import annotations

import mixed
import pytest
import tiny

from linearize import surgery
from linearize.serve.vllm.kinds import as_exported, kinds, name_kinds
from linearize.surgery.model import LinearizedConfig


@pytest.mark.parametrize(
    ("family", "kept"),
    [("llama", "full_attention"), ("qwen2", "full_attention"), ("mistral", "sliding_attention")],
)
def test_layers(family, kept):
    model = surgery.convert(tiny.model(family), tiny.LOLCATS, [0, 2])
    assert kinds(model.config) == ["linear_attention", kept, "linear_attention", kept]


def test_softmax_by_a_mixer():
    """A mixer that looks at the whole text has pages of keys and values, like a kept layer."""
    found = kinds(mixed.mixed().config)
    assert [index for index, kind in enumerate(found) if kind != "linear_attention"] == [2, 3]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_there_and_back(family):
    """The config that vLLM keeps is renamed once, and its copy for transformers is as it was exported."""
    config = surgery.convert(tiny.model(family), tiny.LOLCATS, [1, 2]).config
    before = config.to_dict()
    name_kinds(config)
    name_kinds(config)
    assert config.layer_types.count("linear_attention") == 2
    again = as_exported(config)
    assert isinstance(again, LinearizedConfig) and again.to_dict() == before
    assert config.layer_types.count("linear_attention") == 2
