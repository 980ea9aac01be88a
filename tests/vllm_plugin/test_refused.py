"""What vLLM cannot do with a state is refused by name before an engine starts."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
from served import VLLM, Checkpoint, lolcats

import linearize
from linearize import surgery

pytestmark = pytest.mark.skipif(
    not VLLM, reason="vllm is not installed; `make test-vllm` makes an environment"
)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "takes tokens back",
        ),
        ({"enable_lora": True}, "merge them before the export"),
    ],
)
def test_settings(start, linear, options, named):
    with pytest.raises(Exception, match=named):
        start(linear, **options)


def test_heads_that_cannot_be_shared_out(start, tmp_path):
    """Twelve query heads over four of keys and values, for three processes."""
    model = lolcats(hidden_size=96, num_attention_heads=12, num_key_value_heads=4)
    folder = linearize.save(model, tmp_path / "out")
    with pytest.raises(Exception, match=r"12 query heads over 4 of keys and values .* take 1, 2, 4 or 12"):
        start(Checkpoint(folder, []), tensor_parallel_size=3)


def test_plan(start, linear, tmp_path):
    """A plan that names a part which nobody knows is not handed to the model's code."""
    folder = tmp_path / "damaged"
    shutil.copytree(linear.path, folder)
    config = json.loads((folder / "config.json").read_text())
    next(iter(config["linearize"]["mixers"].values()))["feature_map"]["name"] = "hedgehug"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="hedgehug"):
        start(Checkpoint(folder, []))


def test_plan_of_another_model(start, linear, tmp_path):
    """Its layers are held against the model that config.json describes."""
    folder = tmp_path / "edited"
    shutil.copytree(linear.path, folder)
    config = json.loads((folder / "config.json").read_text())
    next(iter(config["linearize"]["layers"].values()))["scaling"] = 0.3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match=r"scaling: is 0\.3, and the model's own layer has"):
        start(Checkpoint(folder, []))


def test_plan_of_another_rotation(start, linear, tmp_path):
    folder = tmp_path / "turned"
    shutil.copytree(linear.path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] /= 10
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="rotary embedding turns it by"):
        start(Checkpoint(folder, []))


def test_family(start, tmp_path):
    """GPT-2's projections lie the other way round."""
    model = surgery.convert(tiny.model("gpt2", n_embd=128), tiny.LOLCATS, [0, 2])
    folder = linearize.save(model, tmp_path / "out")
    with pytest.raises(Exception, match="is a Conv1D"):
        start(Checkpoint(folder, []))
