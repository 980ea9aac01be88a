"""Roles of linear layers, told by names and sizes: latent and fused ones, outputs beside, and refusals in time."""

from __future__ import annotations

import families_configs
import odd
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from linearize import surgery
from linearize.config.schema import LoraConfig, StageConfig
from linearize.distill.trainable import needs, prepare
from linearize.errors import UnsupportedModelError
from linearize.mixers import LayerShape
from linearize.surgery.projections import outputs, projections, targets

SHAPE = LayerShape(heads=4, kv_heads=2, key_dim=8, value_dim=8, scaling=1.0, model_dim=32)
LATENT = ["kv_a_proj_with_mqa", "kv_b_proj"]


def attention(**sizes: tuple[int, int]) -> nn.Module:
    """A module with linear layers of the given names and (in, out)."""
    module = nn.Module()
    for name, size in sizes.items():
        module.add_module(name, nn.Linear(*size))
    return module


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "out_proj": (32, 32)}, ["out_proj"]),
        ({"Wq": (32, 32), "Wk": (32, 16), "Wv": (32, 16), "dense": (32, 32)}, ["dense"]),
        ({"c_attn": (32, 64), "c_proj": (32, 32)}, ["c_proj"]),
        ({"query_key_value": (32, 64), "dense": (32, 32)}, ["dense"]),
        # a gate on the heads has the sizes of an output projection
        ({"qkv_proj": (32, 64), "gate_proj": (32, 32), "o_proj": (32, 32)}, ["o_proj"]),
        ({"gate_proj": (32, 32), "Wqkv": (32, 64), "dense": (32, 32)}, ["dense"]),
        # two that could be it are none
        ({"c_attn": (32, 64), "first": (32, 32), "second": (32, 32)}, []),
    ],
)
def test_names_and_sizes(sizes, expected):
    found = projections(attention(**sizes), SHAPE)
    assert found["o"] == expected
    assert all(len(found[role]) == 1 for role in "qkv")
    assert (found["q"] == found["k"]) == (len(sizes) < 4)


def test_deeper_layers_of_a_name_are_something_else():
    module = attention(wq=(32, 32), wk=(32, 16), wv=(32, 16), wo=(32, 32))
    module.add_module("indexer", attention(wq_b=(32, 8), wk=(32, 8)))
    assert projections(module, SHAPE) == {"q": ["wq"], "k": ["wk"], "v": ["wv"], "o": ["wo"]}
    wrapped = nn.Module()
    wrapped.add_module(
        "qkv_proj", attention(linear_q=(32, 32), linear_k=(32, 16), val_proj1=(32, 8), val_proj2=(32, 8))
    )
    wrapped.add_module("o_proj", attention(linear=(32, 32)))
    assert projections(wrapped, SHAPE) == {
        "q": ["qkv_proj.linear_q"],
        "k": ["qkv_proj.linear_k"],
        "v": ["qkv_proj.val_proj1", "qkv_proj.val_proj2"],
        "o": ["o_proj.linear"],
    }


def test_missing_roles_are_named_with_what_there_is():
    layer = attention(kv_proj=(32, 32), router=(32, 4))
    model = nn.ModuleDict({"attn": layer})
    assert targets(model, [("attn", layer, SHAPE)], ["k", "v"]) == ["attn.kv_proj"]
    with pytest.raises(
        UnsupportedModelError, match=r"its q, o projection.*found k: kv_proj; v: kv_proj"
    ) as caught:
        targets(model, [("attn", layer, SHAPE)], "qkvo")
    assert "lora.targets: [k, v]" in str(caught.value) and "train: [all]" in str(caught.value)
    with pytest.raises(UnsupportedModelError, match="use attention_output"):
        outputs([("attn", layer, SHAPE)])


def test_layers_that_borrow_keys_are_passed_over():
    own = attention(q_proj=(32, 32), k_proj=(32, 16), v_proj=(32, 16), o_proj=(32, 32))
    borrowing = attention(q_proj=(32, 32), o_proj=(32, 32))
    model = nn.ModuleDict({"a": own, "b": borrowing})
    found = targets(model, [("a", own, SHAPE), ("b", borrowing, SHAPE)], ["q", "k"])
    assert found == ["a.q_proj", "a.k_proj", "b.q_proj"]


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("deepseek_v3", {"q_a_proj", "q_b_proj", *LATENT, "o_proj"}),
        ("sarvam_mla", {"q_proj", *LATENT, "o_proj"}),
        ("ctrl", {"Wq", "Wk", "Wv", "dense"}),
        ("bert", {"query", "key", "value", "dense"}),
        (
            "nemotron_h",
            {"q_proj", "k_proj", "v_proj", "o_proj"},
        ),  # whose blocks are called `mixer`, as ours are
        ("afmoe", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_adapters_hang_on_the_roles_and_nowhere_else(model_type, expected):
    odd.skip_before(model_type)
    model = AutoModelForCausalLM.from_config(families_configs.tiny_config(model_type), dtype=torch.float32)
    recipe = {"feature_map": {"name": "hedgehog", "dim": 8}}
    stage = StageConfig(train=["lora"], objective={"next_token": 1.0}, lora=LoraConfig(rank=2))
    asked = needs([stage])
    assert asked == {"roles": ["q", "k", "v", "o"], "projects": False}
    surgery.plan(model.config, recipe, **asked)
    model = surgery.convert(model, recipe)
    layers = len(surgery.converted(model))
    model = prepare(model, stage)
    hung = [name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name]
    assert len(hung) == layers * len(expected)
    assert {name.rpartition(".")[2] for name in hung} == expected
    assert not any(
        name.startswith("lora_")
        for layer in surgery.converted(model)
        for name in dict(layer.mixer.named_modules())
    )


def test_an_objective_behind_the_projection_is_refused_in_the_plan():
    config = families_configs.tiny_config(
        "bert"
    )  # whose output projection stands beside the attention module
    recipe = {"feature_map": {"name": "hedgehog", "dim": 8}}
    asked = needs([StageConfig(objective={"hidden_alignment": 1.0})])
    with pytest.raises(
        UnsupportedModelError, match=r"attention\.self \(BertSelfAttention\).*use attention_output"
    ):
        surgery.plan(config, recipe, **asked)
    surgery.plan(config, recipe, **needs([StageConfig(objective={"attention_output": 1.0})]))


def test_a_role_without_a_linear_layer_is_refused_in_the_plan():
    """JetMoE makes queries and outputs in experts; found after all training before."""
    model = AutoModelForCausalLM.from_config(families_configs.tiny_config("jetmoe"), dtype=torch.float32)
    recipe = {"feature_map": {"name": "hedgehog", "dim": 8}}
    stage = StageConfig(train=["lora"], objective={"next_token": 1.0}, lora=LoraConfig(rank=2))
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.0\.self_attention.*lora\.targets: \[k, v\] adapts"
    ):
        surgery.plan(model, recipe, **needs([stage]))
    stage.lora.targets = ["k", "v"]
    surgery.plan(model, recipe, **needs([stage]))
    adapted = prepare(surgery.convert(model, recipe), stage)
    hung = {
        name.split(".lora_")[0].rpartition(".")[2]
        for name, _ in adapted.named_parameters()
        if ".lora_" in name
    }
    assert hung == {"kv_proj"}
