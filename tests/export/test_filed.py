"""What transformers keeps under a class's name, its model type or its module holds for the generated classes too."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer

import linearize
from linearize import surgery
from linearize.surgery.attention import Switch, convert_module
from linearize.surgery.cache import LinearizedCacheLayer
from linearize.surgery.generated import subclass

MOE = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "head_dim": 8,
}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
KINDS = {
    "weights renamed by class": ("GPTNeoXConfig", tiny.WITHOUT_GROUPS),
    "experts converted by model type": ("MixtralConfig", {**tiny.COMMON, "num_local_experts": 4}),
    "a buffer that no checkpoint holds": (
        "FalconH1Config",
        {**tiny.COMMON, **MAMBA, "mamba_chunk_size": 8, "num_hidden_layers": 2},
    ),
    "parts kept in float32": ("Glm4MoeConfig", {**tiny.COMMON, **MOE}),
    "a model class of another family": ("InternLM3Config", tiny.COMMON),
}


def teacher(name: str, values: dict, folder) -> transformers.PreTrainedModel:
    """A random model that has been saved, and loaded from its file."""
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(getattr(transformers, name)(**values), dtype=torch.float32)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    made.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def converted(model):
    surgery.convert(model, tiny.LOLCATS)
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    return model


@torch.no_grad()
def logits(model):
    return model(tiny.tokens()).logits


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_of_a_model_from_a_file_is_the_model(kind, tmp_path):
    model = converted(teacher(*KINDS[kind], tmp_path / "teacher"))
    linearize.save(model, tmp_path / "out")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert logits(model).isfinite().all()
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(linearize.load(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_families_of_one_model_class_live_in_one_process(order, tmp_path):
    families = ("LlamaConfig", "ExaoneConfig", "InternLM3Config")
    expected = {}
    for index in order:
        folder = tmp_path / families[index]
        model = converted(teacher(families[index], tiny.COMMON, folder / "teacher"))
        expected[folder] = logits(model), type(model)
        linearize.save(model, folder / "out")
    for folder, (values, cls) in expected.items():
        loaded = linearize.load(folder / "out")
        assert type(loaded) is cls and type(loaded.config) is cls.config_class
        assert torch.equal(logits(loaded), values)


def test_what_the_family_keeps_in_float32_stays_so(tmp_path):
    model = converted(teacher(*KINDS["parts kept in float32"], tmp_path / "teacher"))
    linearize.save(model, tmp_path / "out")
    loaded = linearize.load(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.bfloat16)
    kinds = {name: tensor.dtype for name, tensor in original.state_dict().items()}
    assert set(kinds.values()) == {torch.float32, torch.bfloat16}
    assert {name: loaded[name].dtype for name in kinds} == kinds
    assert {tensor.dtype for name, tensor in loaded.items() if ".mixer." in name} == {torch.float32}


def test_answers_that_are_read_off_the_source_are_the_familys(tmp_path):
    original = teacher(*KINDS["experts converted by model type"], tmp_path / "teacher")
    before = original.config._experts_implementation
    linearize.save(converted(original), tmp_path / "out")
    loaded = linearize.load(tmp_path / "out")
    assert loaded.config._experts_implementation == before
    assert not type(loaded).is_custom_code() and not type(loaded.config).is_custom_code()
    loaded.set_experts_implementation("eager")
    assert (logits(loaded) - logits(original)).abs().max() < 1e-4


def test_trainer_shifts_the_labels_as_the_teachers(tmp_path):
    settings = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    model, ids = tiny.model(), tiny.tokens()
    expected = Trainer(model, settings).compute_loss(model, {"input_ids": ids, "labels": ids})
    with surgery.mode(surgery.convert(model, tiny.LOLCATS), "teacher"):
        found = Trainer(model, settings).compute_loss(model, {"input_ids": ids, "labels": ids})
    assert torch.allclose(found, expected)


def test_a_generated_cache_layer_takes_over_no_other_model():
    class Typed(DynamicLayer):
        _layer_type = "tested"

    try:
        subclass(Typed, LinearizedCacheLayer)
        assert DYNAMIC_LAYER_TYPE_MAPPING["tested"] is Typed
    finally:
        del DYNAMIC_LAYER_TYPE_MAPPING["tested"]


def test_a_mixer_on_the_meta_device_stays_there():
    """transformers builds a model that it loads on the meta device, yet some families make parameters elsewhere."""
    model = surgery.convert(tiny.model(), tiny.LOLCATS)
    plan = model.config.linearize
    with torch.device("meta"):
        mixer = linearize.mixers.build(plan["mixers"]["default"], surgery.converted(model)[0].mixer.shape)
    made = convert_module(tiny.model().model.layers[0].self_attn, mixer, Switch())
    assert all(parameter.is_meta for parameter in made.mixer.parameters())


def test_tokenizer_files_of_the_teacher_are_read_as_the_teachers(tmp_path):
    """A class that the hub names wrongly for a family is corrected by model type."""
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    for name, model in (("teacher", tiny.model("qwen2")), ("out", converted(tiny.model("qwen2")))):
        folder = tmp_path / name
        model.save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({}))
    kinds = [type(AutoTokenizer.from_pretrained(tmp_path / name)) for name in ("teacher", "out")]
    assert kinds[0] is kinds[1]
