"""The ablations on a converted model: each label measures what it says, and the model comes back unchanged."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from linearize import surgery
from linearize.errors import LinearizeError
from linearize.eval.ablation import ablate

HYBRID = {
    "feature_map": {"name": "hedgehog", "dim": 8},
    "update": {"name": "additive"},
    "window": {"name": "sliding", "size": 4},
    "combine": {"name": "shared_normalizer"},
}
LINEAR = {
    "feature_map": {"name": "hedgehog", "dim": 8},
    "update": {"name": "additive"},
    "window": {"name": "none"},
}
LABELS = ["teacher", "linear branch off", "window off", "mixers untrained"]
IDS = torch.arange(2, 22)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train_a_little(model) -> None:
    """Move every mixer parameter away from where it starts."""
    with torch.no_grad():
        for tensor in surgery.mixer_state(model).values():
            tensor.add_(torch.randn_like(tensor))


def test_every_label_differs_and_the_teacher_is_exact(model):
    model.eval()
    teacher = logits(model)
    surgery.convert(model, HYBRID, "all")
    untrained = logits(model)
    train_a_little(model)
    trained = logits(model)
    random_state = torch.get_rng_state()
    found = ablate(model, lambda: logits(model))
    assert list(found) == LABELS
    assert torch.equal(found["teacher"], teacher)
    assert torch.equal(found["mixers untrained"], untrained)
    for label in LABELS:
        assert not torch.allclose(found[label], trained, atol=1e-4), label
    assert torch.equal(logits(model), trained)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_teacher_row_is_optional(model):
    surgery.convert(model, HYBRID, "all")
    assert list(ablate(model, lambda: 0, teacher=False)) == LABELS[1:]


def test_one_branch_alone_has_nothing_to_switch_off(model):
    surgery.convert(model, LINEAR, "all")
    assert list(ablate(model, lambda: 0)) == ["teacher", "mixers untrained"]


def test_the_teacher_has_no_adapters(model):
    model.eval()
    teacher = logits(model)
    surgery.convert(model, HYBRID, "all")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=surgery.role_modules(model, ["q", "v"])))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    before = logits(adapted)
    assert torch.equal(ablate(adapted, lambda: logits(adapted))["teacher"], teacher)
    assert torch.equal(logits(adapted), before)


def test_an_error_inside_leaves_the_model_whole(model):
    surgery.convert(model, HYBRID, "all")
    train_a_little(model)
    before = logits(model)

    def fail() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        ablate(model, fail)
    assert torch.equal(logits(model), before)


def test_a_model_that_was_not_converted_is_refused(model):
    with pytest.raises(LinearizeError, match="no converted layer"):
        ablate(model, lambda: 0)
