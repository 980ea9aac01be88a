"""The mixing matrix of rules that have no weights of one sign, or that no dense form exists of."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from linearize import objectives, surgery
from linearize.mixers import shown

MIXERS: dict[str, dict[str, Any]] = {
    "delta": {
        "feature_map": {"name": "identity"},
        "update": {"name": "delta"},
        "normalizer": {"name": "none"},
    },
    "gated": {
        "feature_map": {"name": "identity"},
        "gate": {"name": "low_rank"},
        "normalizer": {"name": "none"},
    },
    "additive": {"feature_map": {"name": "hedgehog", "dim": 8}, "window": {"name": "sliding", "size": 6}},
    "pure": {"feature_map": {"name": "hedgehog", "dim": 8}},
    "shifted": {
        "feature_map": {"name": "identity", "scaled": False},
        "gate": {"name": "rwkv7", "rank": 3, "per": "query_head"},
        "update": {"name": "rwkv7", "rank": 3, "balanced": False, "shift_projections": True},
        "normalizer": {"name": "none"},
        "position": {"name": "rope", "recurrent": False},
    },
}


@pytest.mark.parametrize("name", MIXERS)
def test_against_the_norm_of_the_whole_matrix(name: str) -> None:
    model = surgery.convert(tiny.model(), MIXERS[name], "all").double()
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    calls: list[Any] = []
    with torch.no_grad(), surgery.observe(model, calls.append):
        model.base_model(input_ids=tiny.tokens(), use_cache=False)
    call = calls[1]
    teacher, student = call.weights(slice(0, 40))
    values = (call.v if call.shifted is None else call.shifted()[2]).repeat_interleave(2, dim=2)
    torch.testing.assert_close(torch.einsum("bhts,bshv->bthv", student, values), call.student())
    expected = (student - teacher).square().sum((2, 3)).sqrt().mean()
    parameters = dict(call.mixer.named_parameters())
    gradients = torch.autograd.grad(expected, list(parameters.values()), allow_unused=True)
    assert shown.shows_products(call.mixer) == (name == "pure")
    value = objectives.layer_backward(call, {"mixing_matrix": 1.0})
    torch.testing.assert_close(value, expected.detach(), rtol=1e-6, atol=0)
    for (part, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        if gradient is not None:
            assert not part.endswith("inputs.mix") or gradient[:2].abs().amax(1).min() > 0
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-9)
    assert sum(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients) > 0
