"""Names, levels, and what is said when they are wrong."""

from __future__ import annotations

import pytest

from linearize import objectives
from linearize.errors import LinearizeError, RecipeError


def test_names_by_level() -> None:
    layer, model, pair = (objectives.names(level) for level in ("layer", "model", "pair"))
    assert layer == [
        "attention_output",
        "attention_output_projected",
        "attention_output_relative",
        "attention_weights",
        "hidden_alignment",
        "mixing_matrix",
    ]
    assert model == ["logits_kl", "next_token"]
    assert pair == ["dpo"]
    assert objectives.names() == sorted(layer + model + pair)


def test_level_of() -> None:
    assert objectives.level_of({"next_token": 1.0, "logits_kl": 1.0}) == "model"
    assert objectives.level_of(["attention_output"]) == "layer"
    with pytest.raises(RecipeError, match="two stages"):
        objectives.level_of(["attention_output", "next_token"])
    with pytest.raises(RecipeError, match="at least one"):
        objectives.level_of([])


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(LinearizeError, match="did you mean 'attention_output'"):
        objectives.get("atention_output")
