"""Queries and keys as they were before their rotation, in every way that families have of turning them."""

from __future__ import annotations

from itertools import product

import families_configs
import pytest
import torch
from families_checks import FORMS, Inputs, forms
from transformers import AutoModelForCausalLM

import linearize
from linearize import surgery
from linearize.errors import UnsupportedModelError
from linearize.mixers.rotations import HALF, WAYS, angles, candidates, rotate_back

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
MODELS = {
    "llama": ("llama", {}, "half"),
    "yarn": ("llama", {"rope_parameters": YARN}, "half"),
    "partial": ("stablelm", {"rope_parameters": PARTIAL}, "half"),
    "gpt_oss": ("gpt_oss", {}, "half-once"),
    "nanochat": ("nanochat", {}, "half-backwards"),
    "deepseek_v3": ("deepseek_v3", {}, "half-last"),
    "cohere": ("cohere", {}, "pairs-each"),
    "glm": ("glm", {}, "pairs"),
    "llama4": ("llama4_text", {}, "pairs-complex"),
    "deepseek_v2": ("deepseek_v2", {"num_key_value_heads": 4}, "pairs-complex-last"),
}
OFF = {
    "feature_map": {"name": "hedgehog", "dim": 8},
    "window": {"name": "sliding", "size": 6, "overlap": True},
    "combine": {"name": "shared_normalizer"},
    "position": {"name": "rope", "recurrent": False},
}


def model_of(name: str):
    family, options, rotary = MODELS[name]
    torch.manual_seed(0)
    config = families_configs.tiny_config(family, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    return model, rotary


def seen(model, positions):
    """The first layer's queries and keys, as they come and before their rotation."""
    calls = []
    with torch.no_grad(), surgery.observe(model, calls.append):
        model(input_ids=Inputs.of(model).ids, position_ids=positions, use_cache=False)
    return (calls[0].q, calls[0].k), calls[0].context["plain"]


@pytest.mark.parametrize("name", MODELS)
def test_taken_back_they_are_those_of_place_0(name):
    model, rotary = model_of(name)
    surgery.convert(model, OFF)
    shape = surgery.converted(model)[0].mixer.shape
    assert shape.rotary == rotary
    turned, plain = seen(model, torch.arange(40).expand(2, -1))
    still, _ = seen(model, torch.zeros(2, 40, dtype=torch.int64))
    rotation = [(q - p).abs().max().item() for q, p in zip(turned, still, strict=True)]
    assert min(rotation) > 0.1
    for found, expected in zip(plain, still, strict=True):
        factor = expected.norm() / found.norm()  # YaRN's on cosines and sines, at place 0 too
        assert factor > 1.05 if name in ("yarn", "gpt_oss") else factor == pytest.approx(1.0, abs=1e-5)
        torch.testing.assert_close(found * factor, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_every_form_agrees_through_files(name, tmp_path):
    """Padded rows, a cache fed in two ways, and generation, of a model that was saved and loaded."""
    model, _ = model_of(name)
    surgery.convert(model, OFF)
    for parameter in (x for layer in surgery.converted(model) for x in layer.mixer.parameters()):
        torch.nn.init.normal_(parameter)
    inputs = Inputs.of(model)
    before = forms(model, inputs)
    linearize.save(model, tmp_path)
    after = forms(linearize.load(tmp_path, dtype=torch.float32).eval(), inputs)
    scale = before["plain"].abs().max().item()
    for form in FORMS:
        torch.testing.assert_close(after[form], before[form], atol=1e-5 * scale, rtol=0)
    for form in ("prefill and tokens", "token by token"):
        torch.testing.assert_close(before[form], before["left padding"], atol=5e-5 * scale, rtol=0)


@pytest.mark.parametrize(("width", "factor"), [*product((16, 8), (1.0, 1.3))], ids=str)
@pytest.mark.parametrize("name", WAYS)
def test_a_way_is_known_by_its_turn_and_taken_back(name, width, factor):
    """Of all ways, on whole heads of 16 and on parts: the first that fits is one that turns the same dims alike."""
    way = WAYS[name]
    generator = torch.Generator().manual_seed(0)
    turns = 1e4 ** -(torch.arange(width // 2) * 2 / width)
    angle = torch.arange(4)[None, :, None] * turns
    cos, sin = angle.cos() * factor, angle.sin() * factor
    rotation = {
        "twice": (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)),
        "each": (cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)),
        "once": (cos, sin),
        "complex": torch.complex(cos, sin),
    }[way.tables]
    x = torch.randn(1, 1, 2, 16, generator=generator).expand(1, 4, 2, 16)
    found = angles(way, rotation)
    assert found is not None
    turned = way.turned(x, *(table[:, :, None] for table in found))
    torch.testing.assert_close(rotate_back(turned, rotation, name), x)
    fitting = []
    for candidate in candidates(rotation, 16):
        back = rotate_back(turned, rotation, candidate)
        if torch.allclose(back, back[:, :1], atol=1e-2, rtol=0):
            torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-5)
            fitting.append(candidate)
    assert fitting
    assert name in fitting or (way.last and width == 16)


def test_a_sine_in_front_of_its_cosine_is_no_turn_that_is_known():
    """It would be taken back to a quarter of a turn from where queries were (CodeGen)."""
    angle = torch.arange(4)[None, :, None] * torch.tensor([1.0, 0.1])
    assert HALF not in list(candidates((angle.sin(), angle.cos()), 16))
    assert not list(candidates((angle.sin(), angle.cos()), 16))


def test_what_is_turned_inside_is_refused_by_name():
    torch.manual_seed(0)
    config = families_configs.tiny_config("codegen")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(
        UnsupportedModelError, match=r"what the layer is handed.*mixer\.position={name: rope}"
    ):
        surgery.convert(model, OFF)


@pytest.mark.parametrize("name", ["llama", "cohere", "deepseek_v3"])
def test_selective_rope_turns_the_teachers_planes(name):
    """On top of the teacher's rotation what two tokens see follows from what lies between, wherever they stand."""
    model, _ = model_of(name)
    shape = surgery.attention_layers(model)[0].shape
    from linearize.mixers import build

    width = 8 if name == "deepseek_v3" else 0
    section = {
        "update": {"name": "additive"},
        "window": {"name": "none"},
        "position": {"name": "selective_rope", "width": width},
    }
    mixer = build(section, shape)
    position = mixer.position
    for parameter in position.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    turned, _ = {}, None
    hidden = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(1))
    for start in (0, 9):
        calls = []
        surgery_model, _ = model_of(name)
        surgery.convert(surgery_model, OFF)
        with torch.no_grad(), surgery.observe(surgery_model, calls.append):
            surgery_model(
                input_ids=Inputs.of(surgery_model).ids[1:, :12],
                position_ids=start + torch.arange(12)[None],
                use_cache=False,
            )
        valid = torch.ones(1, 12, dtype=torch.bool)
        docs = torch.zeros(1, 12, dtype=torch.int64)
        with torch.no_grad():
            q, k, _ = position.turned(calls[0].q, calls[0].k, hidden, valid, docs, None)
        turned[start] = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(shape.group, 2))
    torch.testing.assert_close(turned[0], turned[9], atol=1e-3, rtol=1e-3)
