"""What vLLM reads of a checkpoint's layers, and that the family's own code gets its config back."""

from __future__ import annotations

import mixed
import pytest
import tiny

from linearize import surgery
from linearize.serve.vllm.kinds import as_exported, kinds, name_kinds, unserved
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


def test_what_a_mixer_asks_for_in_vain():
    """Tokens before, where vLLM has no place for them; every other shift lies in a layer's state."""
    rwkv7 = {
        "feature_map": {"name": "identity"},
        "gate": {"name": "rwkv7", "rank": 3, "shift": True},
        "update": {"name": "rwkv7", "rank": 3, "shift": True},
        "normalizer": {"name": "none"},
        "output": {"name": "gate", "rank": 3, "shift": True},
    }
    full = {"window": {"name": "full"}, "output": {"name": "gate", "rank": 3, "shift": True}}
    shifted = {**rwkv7, "update": {**rwkv7["update"], "shift_projections": True}}
    said = {
        name: unserved(surgery.convert(tiny.model(), mixer).config)
        for name, mixer in {"served": rwkv7, "projections": shifted, "softmax": full}.items()
    }
    assert said["served"] == []
    assert len(said["projections"]) == 1 and "mixer.update.shift_projections" in said["projections"][0]
    assert len(said["softmax"]) == 1 and "mixer.output.shift" in said["softmax"][0]
