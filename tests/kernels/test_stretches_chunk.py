"""Stretches of the past in chunks against their quadratic definition: every output, gradient and state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_calls import DEVICE, INTERPRETED, TOLERANCE, USUAL, cases, documents, error, normal, uniform
from torch import Tensor
from torch.nn import functional as F

from linearize.kernels import dispatch
from linearize.kernels.stretches import Stretches, stretches_chunk, stretches_reference, widest
from linearize.mixers.base import positions


def drawn(
    *,
    tokens: int = 100,
    heads: int = 1,
    state_heads: int = 1,
    key_dim: int = 16,
    value_dim: int = 16,
    delta: bool = True,
    decay: str = "head",
    opens: tuple[tuple[int, ...], ...] = ((),),
    padding: int = 0,
    most: int = 9,
) -> dict[str, Any]:
    """Arguments of the definition, float64; `padding` tokens on the left of the last row are nobody's."""
    batch = len(opens)
    docs = documents(batch, tokens, *opens)
    valid = torch.ones(batch, tokens, dtype=torch.bool, device=DEVICE)
    valid[-1, :padding] = False
    place = positions(valid, docs, docs.new_zeros(batch))[0] if tokens else docs
    seen = valid[..., None].cpu().double()
    k = F.normalize(normal(batch, tokens, state_heads, key_dim, seed=1), dim=-1)
    width = {"head": (), "feature": (key_dim,)}.get(decay)
    found: dict[str, Any] = {
        "q": F.normalize(normal(batch, tokens, heads, key_dim, seed=2), dim=-1),
        "k": k * seen[..., None],
        "v": normal(batch, tokens, state_heads, value_dim, seed=3),
        "beta": uniform(batch, tokens, state_heads, seed=4) * seen if delta else None,
        "log_decay": None,
        "shares": uniform(batch, tokens, heads, most, seed=6) * 2,
    }
    if width is not None:
        rates = F.logsigmoid(normal(batch, tokens, state_heads, *width, seed=5) + 3)
        found["log_decay"] = rates * seen.view(batch, tokens, *[1] * (rates.dim() - 2))
    found = {name: None if x is None else x.to(DEVICE) for name, x in found.items()}
    return {**found, "place": place, "docs": docs}


def gradients(outs: list[Tensor], given: dict[str, Any]) -> list[Tensor]:
    wanted = [x for x in given.values() if isinstance(x, Tensor) and x.requires_grad]
    towards = [normal(*out.shape, seed=9).to(out.device, out.dtype) for out in outs]
    return list(torch.autograd.grad(outs, wanted, towards, materialize_grads=True))


def leaves(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def leaf(name: str, x: Any) -> Any:
        if x is None or not x.is_floating_point():
            return x
        kept = dtype if name in "qkv" or dtype == torch.float64 else torch.float32
        return x.to(kept).requires_grad_()

    return {name: leaf(name, x) for name, x in given.items()}


def run(given: dict[str, Any], stretches: Stretches, **options: Any) -> Tensor:
    return stretches_chunk(*given.values(), stretches, **options)[0]


CALLS: dict[str, tuple[dict[str, Any], Stretches]] = {
    "delta": ({}, Stretches(16, 6, False)),
    "delta, no decay": ({"decay": "none"}, Stretches(16, 6, False)),
    "additive": ({"delta": False}, Stretches(16, 6, False)),
    "additive, no decay": ({"delta": False, "decay": "none"}, Stretches(16, 6, False)),
    "three chunks": ({"tokens": 150, "opens": ((11,),)}, Stretches(16, 6, False)),
    "packed, padded": (
        {"opens": ((30, 32, 64, 71, 72),), "padding": 13, "tokens": 83},
        Stretches(4, 8, False),
    ),
    "one token the shortest": ({"opens": ((5, 70),)}, Stretches(1, 9, False)),
    "older": ({"opens": ((21,),), "most": 4}, Stretches(8, 3, True)),
    "older, additive": ({"delta": False, "most": 5, "opens": ((21,),)}, Stretches(1, 4, True)),
    "nothing older": ({"most": 9}, Stretches(16, 8, True)),
    "grouped": (
        {"heads": 2, "tokens": 70, "opens": ((50,),)},
        Stretches(8, 6, False),
    ),
    "grouped, additive": (
        {"heads": 3, "state_heads": 1, "tokens": 70, "opens": ((50,),), "delta": False},
        Stretches(8, 6, False),
    ),
    "one token": ({"tokens": 1}, Stretches(16, 1, False)),
    "no token": ({"tokens": 0}, Stretches(16, 1, False)),
    "a chunk": ({"tokens": 64}, Stretches(16, 3, False)),
    "uneven sizes": ({"tokens": 70, "key_dim": 24, "value_dim": 40}, Stretches(16, 4, False)),
    "wide": ({"tokens": 70, "key_dim": 128, "value_dim": 128}, Stretches(16, 4, False)),
}
RARELY = (
    "delta, no decay",
    "additive, no decay",
    "three chunks",
    "one token the shortest",
    "older",
    "nothing older",
    "a chunk",
    "uneven sizes",
)
BY_FEATURE = {
    "delta by feature": ({"decay": "feature"}, Stretches(16, 6, False)),
    "additive by feature": ({"decay": "feature", "delta": False}, Stretches(16, 6, False)),
}


@pytest.mark.parametrize("name", [*CALLS, *BY_FEATURE])
def test_it_is_the_definition(name):
    options, stretches = {**CALLS, **BY_FEATURE}[name]
    given = leaves(drawn(**options), torch.float64)
    wanted = stretches_reference(**given, block=stretches.block)
    got = run(given, stretches)
    torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-8)
    for one, two in zip(gradients([got], given), gradients([wanted], given), strict=True):
        torch.testing.assert_close(one, two, atol=1e-9, rtol=1e-7)


NAMES = ("q", "k", "v", "beta", "log_decay", "shares", "state")


def compare(given: dict[str, Any], dtype: torch.dtype, function: Any) -> None:
    """`function` of leaves in `dtype` in Triton against that of leaves in float64, with every gradient."""
    found = []
    for kind, kept in (("triton", dtype), ("torch", torch.float64)):
        own = leaves(given, kept)
        with dispatch.kernels(kind):
            outs = function(own)
            found.append([*outs, *gradients(outs, own)])
    assert found[0][0].dtype == dtype
    names = ["out", "state"][: len(outs)] + [name for name in NAMES if given.get(name) is not None]
    for which, one, two in zip(names, *found, strict=True):
        assert error(one, two) < TOLERANCE[dtype], which


@pytest.mark.parametrize(
    ("options", "stretches", "dtype"),
    cases(
        {
            f"{name}-{str(dtype)[6:]}": (*call, dtype)
            for name, call in CALLS.items()
            for dtype in USUAL
            if call[0].get("key_dim", 0) <= widest(dtype)
        },
        {f"{name}-{str(dtype)[6:]}" for name in CALLS for dtype in USUAL[1:]} | set(RARELY),
    ),
)
def test_in_triton(options, stretches, dtype, poisoned_memory):
    def function(given: dict[str, Any]) -> list[Tensor]:
        if given["q"].dtype == torch.float64:
            return [stretches_reference(**given, block=stretches.block)]
        return [run(given, stretches)]

    compare(drawn(**options), dtype, function)


@pytest.mark.parametrize("delta", [True, pytest.param(False, marks=INTERPRETED)])
def test_in_triton_from_a_state(delta, poisoned_memory):
    """What is carried, and what it becomes."""
    given = drawn(delta=delta, tokens=70, most=4, opens=((40,),))
    stretches, before = Stretches(8, 3, True), torch.tensor([37], device=DEVICE)
    given["place"] = given["place"] + before[:, None] * (given["docs"] == 0)
    given["state"] = normal(1, stretches.count, 1, 16, 16, seed=7).to(DEVICE)

    def function(own: dict[str, Any]) -> list[Tensor]:
        state = own.pop("state")
        out, after = stretches_chunk(*own.values(), stretches, before, state)
        own["state"] = state
        return [out, after]

    compare(given, torch.float32, function)


@pytest.mark.parametrize("delta", [True, pytest.param(False, marks=INTERPRETED)])
@pytest.mark.parametrize("stretches", [Stretches(1, 3, True), Stretches(8, 4, False)], ids=str)
def test_in_triton_with_padding_behind(delta, stretches, poisoned_memory):
    """A row without a token, one whose last chunk is padding, one whose last chunk has one token: what each holds."""
    tokens = torch.tensor([0, 5, 65], device=DEVICE)
    before = torch.tensor([40, 37, 63], device=DEVICE)
    given = drawn(delta=delta, tokens=66, most=4 if stretches.older else 5, opens=((), (), ()))
    valid = torch.arange(66, device=DEVICE) < tokens[:, None]
    for name in ("k", "beta", "log_decay"):
        if given[name] is not None:
            given[name] = given[name] * valid.view(3, 66, *[1] * (given[name].dim() - 2))
    given["place"] = positions(valid, given["docs"], before)[0]
    given["state"] = normal(3, stretches.count, 1, 16, 16, seed=7).to(DEVICE)

    def function(own: dict[str, Any]) -> list[Tensor]:
        state = own.pop("state")
        out, after = stretches_chunk(*own.values(), stretches, before, state)
        own["state"] = state
        return [out * valid[..., None, None], after]

    compare(given, torch.float32, function)
    with torch.no_grad():
        after = function(leaves(given, torch.float64))[1]
    assert torch.equal(after[0], given["state"][0]), "a row without a token holds what it held"


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"decay": "feature"}, "log_decay: .* one a head, not one a key dimension"),
        ({"key_dim": 65}, "key_dim: 65 must be at most 64 in torch.float32"),
        ({"value_dim": 65}, "value_dim: 65 must be at most 64 in torch.float32"),
    ],
)
def test_what_is_not_covered_is_refused(options, rule):
    given = leaves(drawn(**options, tokens=8), torch.float32)
    with dispatch.kernels("triton"), pytest.raises(dispatch.KernelError, match=rule):
        run(given, Stretches(16, 1, False))
