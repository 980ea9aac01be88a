"""Models that read more than text: what text does not come by stays as it is, and is no reason to refuse."""

from __future__ import annotations

import families_configs
import pytest
import torch
from families_checks import LOLCATS, Inputs
from transformers import AutoModelForCausalLM

from linearize import surgery
from linearize.errors import UnsupportedModelError


def model_of(family: str):
    torch.manual_seed(0)
    config = families_configs.tiny_config(family)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("family", "text", "other"),
    [
        ("gemma3", "model.language_model.layers.", "model.vision_tower."),
        ("got_ocr2", "model.language_model.layers.", "model.vision_tower."),
        (
            "bart",
            "model.decoder.layers.",
            "encoder_attn",
        ),  # to an encoder's output, which a decoder alone has not
    ],
)
def test_layers_of_text_are_converted_and_others_stay(family, text, other):
    model = model_of(family)
    before = {name: type(module) for name, module in model.named_modules() if other in name}
    planned = [row.path for row in surgery.plan(model.config, LOLCATS).rows]
    surgery.convert(model, LOLCATS)
    found = [name for name, module in model.named_modules() if hasattr(module, "mixer")]
    assert before and found == planned and all(name.startswith(text) for name in found)
    assert before == {name: type(module) for name, module in model.named_modules() if other in name}


def test_a_text_with_an_image_that_is_read_in_both_directions_is_refused_by_name():
    """Gemma 3 does so; a mixer would read it from left to right, in silence."""
    model = surgery.convert(model_of("gemma3"), LOLCATS)
    ids = Inputs.of(model).ids
    image = torch.zeros_like(ids)
    with torch.no_grad():
        model(input_ids=ids, token_type_ids=image)
        image[:, 10:20] = 1
        with pytest.raises(UnsupportedModelError, match="a part read in both directions"):
            model(input_ids=ids, token_type_ids=image)


def test_of_a_model_without_a_decoder_nothing_is_left_out():
    with pytest.raises(UnsupportedModelError, match=r"not causal \(is_causal=False\)"):
        model = model_of("llama")
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
        surgery.attention_layers(model)
