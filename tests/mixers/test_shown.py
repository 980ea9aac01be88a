"""Matrices that never are: the terms of every composition against its own definition in float64, gradients with it."""

from __future__ import annotations

import pytest
import torch
from compositions import SHAPES, Draw, label, make, registered
from kernel_calls import DEVICE
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.mixing_matrix import compared
from linearize.mixers import Mixer, build, shown

SHAPE = SHAPES["grouped"]
TOKENS = 23
HEDGEHOG = {"name": "hedgehog", "dim": 8}
MOHAWK = {
    "short_conv": {"name": "depthwise", "roles": "qkv"},
    "feature_map": {"name": "identity"},
    "gate": {"name": "mamba2"},
    "update": {"name": "rwkv6"},
    "normalizer": {"name": "none"},
    "output": {"name": "gate", "constant": True},
    "position": {"name": "rope", "recurrent": False},
}
HEDGECATS = {
    "feature_map": HEDGEHOG,
    "window": {"name": "sliding", "size": 5, "overlap": True, "first": 2},
    "combine": {"name": "shared_normalizer", "complement": True},
}
TRAINED = {
    "hedgehog": ({"feature_map": HEDGEHOG}, "cross_entropy", True),
    "hedgecats, window off": (HEDGECATS, "cross_entropy", True),
    "hedgecats": (HEDGECATS, "cross_entropy", False),
    "lolcats": ({"feature_map": HEDGEHOG, "window": {"name": "sliding", "size": 5}}, "cross_entropy", False),
    "mohawk": (MOHAWK, "squares", True),
    "delta": (
        {"feature_map": {"name": "identity"}, "update": {"name": "delta"}, "normalizer": {"name": "none"}},
        "squares",
        False,
    ),
}
"""Name -> composition, kind, whether its weights are products of features."""


def masks() -> dict[str, Tensor]:
    """Documents, padding in front, between and behind."""
    valid, starts = torch.ones(2, TOKENS, dtype=torch.bool), torch.zeros(2, TOKENS, dtype=torch.bool)
    valid[0, :3] = valid[1, 9:11] = valid[1, -1] = False
    starts[0, 12] = starts[1, [5, 6, 17]] = True
    return {"valid": valid, "starts": starts}


def expected(mixer: Mixer, kind: str, x: Draw, given: dict[str, Tensor]) -> Tensor:
    """`compared` of both definitions, [B, T, H]."""
    context = {"hidden": x.hidden, "plain": x.plain, "first": x.first}
    softmax = build({"window": {"name": "full"}}, mixer.shape)
    teacher = softmax.parallel(x.q, x.k, None, **given).detach()
    return compared(kind, teacher, mixer.parallel(x.q, x.k, None, **given, **context))


def found(mixer: Mixer, kind: str, x: Draw, given: dict[str, Tensor]) -> Tensor:
    """The sum of the terms."""
    context = {"hidden": x.hidden, "plain": x.plain, "first": x.first}
    return sum(term() for term in shown.terms(mixer, kind, x.q, x.k, x.v, **given, **context))


def every() -> list:
    """A few of each kind in every run, all of them where there is time."""
    mixers = registered()
    return [
        pytest.param(mixer, id=label(mixer), marks=[] if number % 8 == 0 else [pytest.mark.slow])
        for number, mixer in enumerate(mixers)
    ]


@pytest.mark.parametrize("mixer", every())
def test_terms_add_up_to_the_definition(mixer: dict) -> None:
    made, x, given = make(mixer, SHAPE, torch.float64), Draw.of(SHAPE, TOKENS, torch.float64), masks()
    with torch.no_grad():
        valid = given["valid"]
        wanted, ours = (side(made, "squares", x, given)[valid] for side in (expected, found))
    torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9 * max(1.0, wanted.abs().max().item()))


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_are_those_of_the_definition(name: str) -> None:
    mixer, kind, products = TRAINED[name]
    made, x, given = make(mixer, SHAPE, torch.float64), Draw.of(SHAPE, TOKENS, torch.float64), masks()
    made.branch_off = "window" if name.endswith("off") else None
    assert shown.shows_products(made) == products
    slope = torch.rand(2, TOKENS, SHAPE.heads, dtype=torch.float64) * given["valid"][..., None]
    losses = [(side(made, kind, x, given) * slope).sum() for side in (expected, found)]
    torch.testing.assert_close(losses[1], losses[0])
    parameters = dict(made.named_parameters())
    wanted, ours = (
        torch.autograd.grad(loss, list(parameters.values()), allow_unused=True) for loss in losses
    )
    reached = 0
    for parameter, want, got in zip(parameters, wanted, ours, strict=True):
        if want is None or want.abs().max() == 0:
            assert got is None or got.abs().max() == 0, parameter
            continue
        torch.testing.assert_close(
            got, want, rtol=1e-7, atol=1e-9, msg=lambda text, p=parameter: f"{p}: {text}"
        )
        reached += 1
    assert reached


def placed(mixer: dict, dtype: torch.dtype) -> Mixer:
    """Where Triton runs: on a card, or in its interpreter."""
    return make(mixer, SHAPE, dtype).to(DEVICE)


def test_features_that_float16_does_not_hold() -> None:
    mixer, x = {"feature_map": {"name": "exp"}}, Draw.of(SHAPE, TOKENS, torch.float16)
    x.k[0, 7] = 12.0
    x = x.apply(lambda y: y.to(DEVICE))
    with torch.no_grad():
        with dispatch.kernels("triton"):
            rows = found(placed(mixer, torch.float16), "cross_entropy", x, {})
        wanted = expected(placed(mixer, torch.float64), "cross_entropy", x.apply(Tensor.double), {})
    torch.testing.assert_close(rows, wanted.to(rows), rtol=1e-2, atol=1e-2)


def test_weights_that_float16_does_not_hold() -> None:
    """A token that the teacher looks at and the student hardly sees: 1e-8 is no 1e-12, at which its loss would end."""
    mixer, x = (
        {"feature_map": {"name": "exp"}, "window": {"name": "sliding", "size": 5}},
        Draw.of(SHAPE, TOKENS, torch.float16),
    )
    x.k[:, 7], x.q[:] = -18.0, -x.q.abs()
    x = x.apply(lambda y: y.to(DEVICE))
    with torch.no_grad():
        with dispatch.kernels("triton"):
            rows = found(placed(mixer, torch.float16), "cross_entropy", x, {})
        wanted = expected(placed(mixer, torch.float64), "cross_entropy", x.apply(Tensor.double), {})
    assert 15 < wanted.max() < 25, "the loss of a weight between 1e-7 and 1e-12"
    torch.testing.assert_close(rows, wanted.to(rows), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", TRAINED)
def test_float16_makes_every_kind_of_matrix(name: str) -> None:
    mixer, kind, _ = TRAINED[name]
    x, given = Draw.of(SHAPE, TOKENS, torch.float16), masks()
    made, exact = (make(mixer, SHAPE, dtype) for dtype in (torch.float16, torch.float64))
    exact.load_state_dict(made.state_dict())
    made.branch_off = exact.branch_off = "window" if name.endswith("off") else None
    with torch.no_grad():
        rows, wanted = found(made, kind, x, given), expected(exact, kind, x.apply(Tensor.double), given)
    torch.testing.assert_close(rows[given["valid"]], wanted[given["valid"]].to(rows), rtol=2e-2, atol=2e-2)


def test_a_teachers_window_and_cap() -> None:
    shape = SHAPES["capped"]
    made = make({"feature_map": HEDGEHOG}, shape, torch.float64)
    x = Draw.of(shape, TOKENS, torch.float64)
    with torch.no_grad():
        for kind in ("cross_entropy", "squares"):
            torch.testing.assert_close(found(made, kind, x, {}), expected(made, kind, x, {}))
