"""A window with a branch beside it starts no further from its teacher than the window alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_by_hand import SHAPE, Call, call

from linearize.config import compose, list_recipes
from linearize.mixers import build, calibration
from linearize.mixers.combine import SHUT

ALONE = {"name": "sliding", "size": 16, "first": 2}
OVERLAPPING = {**ALONE, "overlap": True}
SIGNED = {"feature_map": {"name": "identity"}, "window": OVERLAPPING, "combine": {"name": "sigmoid"}}
POSITIVE = {"feature_map": {"name": "relu"}, "window": OVERLAPPING}
RULES: dict[str, dict[str, Any]] = {
    "a share, no size": {
        **SIGNED,
        "gate": {"name": "scalar", "per": "kv_head"},
        "update": {"name": "mlstm"},
        "normalizer": {"name": "bounded"},
    },
    "a share and a size": {**SIGNED, "update": {"name": "delta"}, "normalizer": {"name": "none"}},
    "a share of averages": {**POSITIVE, "combine": {"name": "sigmoid"}},
    "a share of each token": {**POSITIVE, "combine": {"name": "sigmoid", "per": "token"}},
    "weights": {**POSITIVE, "combine": {"name": "weighted", "per": "head"}},
    "one normalizer": {
        **POSITIVE,
        "window": ALONE,
        "combine": {"name": "shared_normalizer", "complement": True},
    },
}


def error(made: Call) -> float:
    assert made.teacher is not None
    with torch.no_grad():
        return float((made.student() - made.teacher).square().sum() / made.teacher.square().sum())


def of_the_window(made: Call) -> Call:
    """With what its window gives alone as the teacher's answer."""
    with torch.no_grad():
        made.teacher = call({"window": ALONE}).student()
    return made


@pytest.mark.parametrize("rule", RULES)
def test_a_teacher_that_is_the_window_leaves_nothing_for_the_branch(rule):
    made = of_the_window(call(RULES[rule]))
    fitted = calibration.calibrate(made)
    assert fitted.before > 0.01
    assert fitted.after < 1e-4


@pytest.mark.parametrize("rule", RULES)
def test_branches_are_shut_whatever_they_hold(rule):
    """And everything else stays as it is, above all what the branch is made with."""
    made = of_the_window(call(RULES[rule]))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.mixer.named_parameters():
            if "combine" in name or name.endswith("scale"):
                parameter.copy_(torch.rand_like(parameter))
    kept = {name: value.clone() for name, value in made.mixer.state_dict().items()}
    fitted = calibration.calibrate(made, heard=SHUT, plain=True, sizes_only=True)
    assert fitted.before > 0.01
    assert fitted.after == pytest.approx(error(made)) and fitted.after < 1e-3
    changed = {name for name, value in made.mixer.state_dict().items() if not torch.equal(value, kept[name])}
    assert changed and all("combine" in name or name.endswith("scale") for name in changed)


def test_what_cannot_be_shut_is_set_as_ever():
    """No branch, no window, or a rule whose branch keeps its weight."""
    quotient = {**POSITIVE, "window": ALONE, "combine": {"name": "shared_normalizer"}}
    alone = {"feature_map": {"name": "relu"}, "normalizer": {"name": "group_norm"}}
    fixed = {**POSITIVE, "combine": {"name": "weighted", "per": "layer"}}
    for mixer in (quotient, alone, fixed):
        made = call(mixer)
        torch.manual_seed(1)
        made.teacher = torch.randn(2, 96, 4, 8)
        shut = calibration.calibrate(made, heard=SHUT, plain=True, sizes_only=True)
        found = {name: value.clone() for name, value in made.mixer.state_dict().items()}
        made.mixer.reset_parameters()
        assert calibration.calibrate(made, plain=True, sizes_only=True) == shut
        assert all(torch.equal(value, found[name]) for name, value in made.mixer.state_dict().items())


def test_a_gate_that_shrinks_signed_sums_is_found():
    """Sums of large signed scores are a harmful branch under a gate of one, and a useful one of its size."""
    made = call(RULES["a share, no size"])
    made.q, made.k = 6 * made.q, 6 * made.k
    update, gate = made.mixer.update, made.mixer.recurrent.gate
    with torch.no_grad():
        gate.bias.copy_(torch.tensor([3.45, 3.45]))
        update.input_bias.fill_(-4.0)
        made.mixer.combine.window_factor.fill_(0.5)
        made.teacher = made.student()
        made.mixer.reset_parameters()
    fitted = calibration.calibrate(made)
    assert (update.input_bias <= -2).all()
    assert fitted.after < 0.1 * fitted.before


def test_every_shipped_rule_can_be_shut():
    found = []
    for name, _ in list_recipes():
        combine = build(compose(name).mixer, SHAPE).combine
        if combine is not None:
            found.append(name)
            assert combine.lower(SHUT), name
    assert {"mlstm", "lolcats", "liger_gla", "priming", "sse"} <= set(found)


@pytest.mark.parametrize("rule", RULES)
def test_a_branch_is_heard_less_and_can_still_learn(rule):
    """Half of its share, and even shut its own parameters have a gradient."""
    made = call(RULES[rule])
    combine = made.mixer.combine
    ends = [made.student()]
    for heard in (0.5, SHUT):
        assert combine.lower(heard)
        ends.append(made.student())
    apart, half = ends[0] - ends[2], ends[1] - ends[2]
    share = (apart * half).sum() / apart.square().sum()
    assert 0.2 < share < 0.9, "one normalizer is no straight line"
    ends[2].square().sum().backward()
    heard = [
        x.grad for name, x in made.mixer.named_parameters() if name.startswith(("recurrent.", "update."))
    ]
    assert all(grad is None or grad.any() for grad in heard)
