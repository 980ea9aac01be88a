"""Configs and weights that cannot be right are refused by name, before memory is taken and without running anything."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from linearize.errors import CheckpointError, LinearizeError, ModelNotFoundError, UnsupportedModelError
from linearize.models import load_config, load_teacher, resolve

WEIGHT = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of one weight file."""
    tiny.model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "one")
    return tmp_path / "one"


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refusals(folder: Path, kind: type[LinearizeError] = CheckpointError) -> list[str]:
    """What inspecting and loading say; both must refuse, at once."""
    said = []
    for loader in (load_config, load_teacher):
        started = time.process_time()
        with pytest.raises(kind) as caught:
            loader(str(folder))
        assert time.process_time() - started < 10
        said.append(str(caught.value))
        assert "trust_remote_code=True" not in said[-1]
    return said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1}, r"holds 9 tensors that config.json does not ask for (model.layers.1."),
        ({"num_hidden_layers": 0}, "holds 18 tensors that config.json does not ask for"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1,000,000, and no model has more than 2,000"),
        ({"num_hidden_layers": 500}, "num_hidden_layers is 500, and the weight files hold 21 tensors"),
        ({"num_hidden_layers": 3}, "lacks 9 of the model's tensors (model.layers.2."),
        ({"num_labels": 10**9}, "num_labels is 1,000,000,000"),
        ({"attention_bias": True}, "lacks 8 of the model's tensors"),
        ({"hidden_size": 10**9}, "21 tensors do not fit config.json"),
        ({"hidden_size": 10**30}, "cannot be made"),
        ({"hidden_size": -4}, "negative dimension -4"),
        ({"num_attention_heads": 0}, "config.json cannot be read: ZeroDivisionError"),
        ({"num_attention_heads": "x"}, "expected int, got str"),
        ({"head_dim": 0}, "cannot be made: ZeroDivisionError"),
        ({"rope_parameters": {"rope_type": "evil"}}, "cannot be made: KeyError"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN"),
        ({"dtype": "evil"}, "AttributeError"),
        ({"pad_token_id": 10**9}, "Padding_idx must be within"),
        ({"get_text_config": 3}, "has the name of a method"),
        ({"model_type": ["llama"]}, "model_type is ['llama'], and a name is asked for"),
    ],
    ids=str,
)
def test_a_config_that_the_weights_do_not_fit(folder, changes, message):
    edit(folder, **changes)
    for said in refusals(folder):
        assert message in said


def test_a_config_without_sizes_does_not_build_the_default_model(folder):
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for said in refusals(folder):
        assert "lm_head.weight is [97, 32], and [32000, 4096] is asked for" in said


def test_a_table_for_absurd_lengths_is_not_computed(tmp_path):
    tiny.model("gpt_neox").save_pretrained(tmp_path / "neox")
    tiny.model("gpt2").save_pretrained(tmp_path / "gpt2")
    edit(tmp_path / "gpt2", n_positions=10**7)
    assert "do not fit" in refusals(tmp_path / "gpt2")[0]


def test_a_config_nested_without_end(folder):
    (folder / "config.json").write_text("[" * 100_000)
    for said in refusals(folder):
        assert "nested too deeply" in said


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "mxfp4"])
def test_quantized_teachers(folder, method):
    edit(folder, quantization_config={"quant_method": method, "bits": 4})
    for said in refusals(folder, UnsupportedModelError):
        assert f"quantized ({method})" in said and "unquantized checkpoint" in said


def test_codes_whose_quantization_nobody_names(folder):
    rewrite(folder, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].to(torch.float8_e4m3fn)}))
    for said in refusals(folder, UnsupportedModelError):
        assert f"1 of its weights are stored as F8_E4M3 ({WEIGHT}" in said


@pytest.mark.parametrize("kind", ["bart", "t5", "bert2bert"])
def test_models_that_are_no_decoders_alone(folder, kind):
    edit(folder, **({"is_encoder_decoder": True} if kind == "bert2bert" else {"model_type": kind}))
    for said in refusals(folder, UnsupportedModelError):
        assert said.endswith("give a decoder") and len(said) < 400


@pytest.mark.parametrize(
    "key", ["_attn_implementation", "attn_implementation", "_attn_implementation_internal"]
)
def test_a_config_chooses_no_kernel(folder, key):
    edit(folder, **{key: "evil/kernel"})
    assert load_teacher(str(folder))[0].config._attn_implementation == "sdpa"


def test_a_config_chooses_no_other_weights_and_no_code(folder, tmp_path):
    expected = load_teacher(str(folder))[0](tiny.tokens()).logits
    edit(
        folder,
        transformers_weights="../x.safetensors",
        fusion_config={"x": 1},
        auto_map={"AutoConfig": "evil.C"},
    )
    (folder / "evil.py").write_text("raise RuntimeError('ran code from the checkpoint')")
    assert torch.equal(load_teacher(str(folder))[0](tiny.tokens()).logits, expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_beams", "x"), ("temperature", []), ("eos_token_id", "evil"), ("do_sample", 3), ("max_length", -1)],
)
def test_a_generation_config_that_generate_could_not_use(folder, key, value):
    (folder / "generation_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {key} must be "):
        load_teacher(str(folder))


def test_an_adapter_beside_a_model_is_not_loaded_along(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/x"}')
    with pytest.raises(CheckpointError, match=r"holds an adapter .* beside a whole model; merge it"):
        load_teacher(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(folder, value):
    rewrite(folder, lambda tensors: tensors[WEIGHT][3].fill_(value))
    with pytest.raises(
        CheckpointError, match=rf"the weights of .* hold NaN or infinite .* in 1 of 21 .*first: {WEIGHT}"
    ):
        load_teacher(str(folder))


def test_a_rotation_that_is_no_number(folder):
    edit(folder, rope_parameters={"rope_type": "default", "rope_theta": 0})
    with pytest.raises(CheckpointError, match=r"hold NaN or infinite .*inv_freq"):
        load_teacher(str(folder))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",  # a parameter of a module that is there
        "model.layers.0.self_attn.q_norm.weight",  # a module of a layer that is there
        "model.layers.0.self_attn.draft_proj.weight",  # called like a head that guesses ahead
        "model.norm.bias",
        "model.embed_positions.weight",  # beside the embeddings
    ],
)
def test_tensors_that_would_change_the_model_are_not_left_out(folder, name):
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(32)}))
    for said in refusals(folder):
        assert f"holds 1 tensors that config.json does not ask for ({name})" in said


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight",
        "multi_modal_projector.linear_1.weight",
        "score.weight",
        "mtp.layers.0.input_layernorm.weight",
    ],
)
def test_tensors_of_other_senses_and_tasks_may_be_there(folder, name):
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(32)}))
    assert load_teacher(str(folder))[0].config.num_hidden_layers == 2


def test_layers_that_guess_ahead_may_be_there(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.2.eh_proj.weight": torch.zeros(32)}))
    assert "model.layers.2.eh_proj.weight" in refusals(folder)[0]
    edit(folder, num_nextn_predict_layers=1)
    load_teacher(str(folder))


def test_a_model_without_its_last_layer_does_not_pass_as_one_that_guesses_ahead(folder):
    edit(folder, num_hidden_layers=1, num_nextn_predict_layers=1)
    for said in refusals(folder):
        assert "holds 9 tensors that config.json does not ask for (model.layers.1." in said


# What stands where the weights are expected, and where MODEL leads.


def test_weights_that_are_no_file(folder):
    weights = folder / "model.safetensors"
    weights.rename(folder / "kept")
    made = {"a folder": weights.mkdir, "a pipe": lambda: os.mkfifo(weights)}
    for what, make in made.items():
        make()
        with pytest.raises(CheckpointError, match=f"model.safetensors is {what} and not a file"):
            load_teacher(str(folder))
        (weights.rmdir if weights.is_dir() else weights.unlink)()
    weights.symlink_to(weights)
    with pytest.raises(CheckpointError, match="a symbolic link that leads nowhere or in a circle"):
        load_teacher(str(folder))


def test_a_model_that_is_a_link_in_a_circle(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(
        ModelNotFoundError, match=r"loop': it is a symbolic link that leads nowhere or in a circle"
    ):
        resolve(str(loop))
    with pytest.raises(ModelNotFoundError, match="it is a device"):
        resolve("/dev/zero")
    with pytest.raises(ModelNotFoundError, match="no such file or folder"):
        resolve("./" + "x" * 3000)


def test_weights_behind_links_load_as_in_the_hubs_cache(folder, tmp_path):
    blob = tmp_path / "blobs" / "0123"
    blob.parent.mkdir()
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(Path("..") / "blobs" / "0123")
    assert load_teacher(str(folder))[1] is None
