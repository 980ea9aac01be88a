"""Gated slots and decays of values in Triton against the loop over tokens in float64, with every gradient."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import kernel_calls
import pytest
import torch
from kernel_calls import DEVICE, NARROW, normal
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.dispatch import KernelError
from linearize.kernels.gated_linear import gated_linear_chunk, gated_linear_reference
from linearize.kernels.gated_linear.operator_values import gated_values_triton
from linearize.kernels.slots import slots_chunk, slots_reference, slots_step
from linearize.kernels.slots.operator import slots_triton

TOLERANCE = {
    dtype: most if dtype == torch.float32 else 2 * most for dtype, most in kernel_calls.TOLERANCE.items()
}
error = partial(kernel_calls.error, least=1e-1)
STRENGTHS = {
    "weak": lambda u: -0.1 * u,
    "mild": lambda u: -u,
    "strong": lambda u: -20 * u,
    "mixed": lambda u: -torch.where(u > 0.8, 20.0 * u, 0.01 * u),
    "huge": lambda u: -torch.where(u > 0.9, 3000.0 * u, 0.02 * u),
}


@dataclass(frozen=True)
class Case:
    """One shape with its options; `slots` None is the first pass alone, with 16 decaying values."""

    slots: int | None = 16
    strength: str = "mild"
    tokens: int = 70
    heads: int = 1
    state_heads: int = 1
    keys: int = 16
    values: int = 16
    documents: bool = False
    own_writes: bool = False
    read_before: bool = False
    state: bool = False
    segments: int = 0
    batch: int = 1


CASES = {
    "mild": Case(),
    "one": Case(tokens=1, batch=2, state=True),
    "strong": Case(strength="strong", own_writes=True, tokens=90),
    "mixed": Case(strength="mixed", tokens=100, own_writes=True),
    "huge": Case(strength="huge", documents=True),
    "grouped": Case(strength="mixed", heads=2, documents=True, state=True),
    "documents": Case(tokens=135, strength="weak", batch=2, documents=True, state=True),
    "segments": Case(tokens=270, strength="weak", segments=3, state=True, documents=True),
    "odd_widths": Case(slots=20, keys=24, values=40, state=True),
    "many_slots": Case(slots=72, tokens=20, state=True),
    "values-mild": Case(None),
    "values-mixed": Case(None, strength="mixed", heads=2, documents=True, state=True, tokens=100),
    "values-before": Case(None, strength="mixed", read_before=True, documents=True, state=True),
    "values-segments": Case(None, tokens=270, strength="weak", segments=3, state=True, keys=24, values=20),
}
TWICE = {"mild", "grouped", "values-mixed"}
PAIRS = {
    f"{name}-{str(dtype).removeprefix('torch.')}": (case, dtype)
    for name, case in CASES.items()
    for dtype in (NARROW if DEVICE == "cuda" or name in TWICE else NARROW[:1])
}
RARELY = {"mixed", "strong", "documents"}


def draw(case: Case) -> dict[str, Tensor]:
    """Random float64 inputs of a call; padding (zero key, writes and log decay) in front and in the middle."""
    size = (case.batch, case.tokens, case.state_heads)
    keep = torch.ones(case.batch, case.tokens, 1, 1, dtype=torch.float64)
    if case.documents:
        keep[0, :3] = keep[-1, case.tokens // 2] = 0
    width = case.values if case.slots is None else case.slots
    uniform = torch.rand(*size, width, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = {
        "q": normal(case.batch, case.tokens, case.heads, case.keys, seed=1) * case.keys**-0.5,
        "k": normal(*size, case.keys, seed=2) * keep,
        "v": normal(*size, case.values, seed=3),
        "log_decay": STRENGTHS[case.strength](uniform) * keep,
    }
    if case.own_writes:
        found["writes"] = normal(*size, width, seed=5) * keep
    if case.state:
        found["first"] = normal(case.batch, case.state_heads, case.keys, width, seed=6)
        if case.slots is not None:
            found["second"] = normal(case.batch, case.state_heads, width, case.values, seed=7)
    return {name: x.to(DEVICE) for name, x in found.items()}


def documents(case: Case) -> Tensor:
    """Row 0: the carried document goes on for a while, then ones of many lengths. Row 1: a start at token 0."""
    places = [(5, 6, 40, 64, 100, 128, 270), (0, 3, 70, 130)] if case.documents else []
    return kernel_calls.documents(case.batch, case.tokens, *places)


def run(case: Case, dtype: torch.dtype, form: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Results and gradients by name."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    narrow = ("q", "k", "v", "writes")
    x = {n: value.to(dtype if n in narrow else wide).requires_grad_() for n, value in draw(case).items()}
    docs = documents(case)
    width = x["log_decay"].shape[-1]
    size = (case.batch, case.state_heads)
    first = x.get("first", x["log_decay"].new_zeros(*size, case.keys, width))
    second = x.get("second", x["log_decay"].new_zeros(*size, width, case.values))
    qkv = [x[name] for name in "qkv"]
    if case.slots is None:
        options = {"read_before": case.read_before}
        if form == "reference":
            options |= {"normalize": False, "decay_values": True}
            out, _, (keys, _) = gated_linear_reference(*qkv, x["log_decay"], docs, (first, None), **options)
        else:
            given = docs if case.documents else None
            with dispatch.kernels("triton"):
                out, _, (keys, _) = gated_values_triton(
                    *qkv, x["log_decay"], given, x.get("first"), segments=case.segments, **options
                )
        found = {"out": out, "keys": keys}
    else:
        arguments = (*qkv, x.get("writes"), x["log_decay"], docs, (first, second))
        if form == "reference":
            out, (keys, values) = slots_reference(*arguments)
        else:
            with dispatch.kernels("triton"):
                out, (keys, values) = slots_triton(*arguments, segments=case.segments)
        found = {"out": out, "keys": keys, "values": values}
    assert all(value.isfinite().all() for value in found.values())
    total = sum(
        (value.to(wide) * normal(*value.shape, seed=9).to(DEVICE, wide)).sum() for value in found.values()
    )
    grads = torch.autograd.grad(total, list(x.values()))
    return {n: value.detach() for n, value in found.items()}, dict(zip(x, grads, strict=True))


@cache
def exact(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return run(case, torch.float64, "reference")


@pytest.mark.parametrize(("case", "dtype"), kernel_calls.cases(PAIRS, RARELY))
def test_equals_the_definition(case, dtype):
    results, gradients = exact(case)
    found, grads = run(case, dtype, "triton")
    assert found["out"].dtype == dtype
    assert all(found[name].dtype == torch.float32 for name in found if name != "out")
    errors = {name: error(found[name], results[name]) for name in results}
    errors |= {f"d{name}": error(grads[name], gradients[name]) / 3 for name in grads}
    assert max(errors.values()) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("own_writes", [False, True])
@pytest.mark.parametrize("shape", [(6, 2, 20, 40, 12), (2, 2, 64, 128, 64), (3, 1, 130, 70, 100)], ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_one_token_in_place_equals_torch(own_writes, shape, dtype):
    heads, state_heads, keys, values, slots = shape
    size = (2, state_heads)
    q = normal(2, heads, keys, seed=1) * keys**-0.5
    given = [q, normal(*size, keys, seed=2), normal(*size, values, seed=3)]
    given += [normal(*size, slots, seed=4) if own_writes else None, -normal(*size, slots, seed=5).abs()]
    given = [x if x is None else x.to(DEVICE, dtype) for x in given]
    memory = [
        normal(*size, keys, slots, seed=6).float().to(DEVICE),
        normal(*size, slots, values, seed=7).float().to(DEVICE),
    ]
    states = [[x.to(kind, copy=True) for x in memory] for kind in (torch.float32, torch.float64)]
    with dispatch.kernels("triton"):
        ours = slots_step(*given, *states[0])
    theirs = slots_step(*(x if x is None else x.double() for x in given), *states[1])
    assert ours.dtype == dtype
    for one, other in zip((ours, *states[0]), (theirs, *states[1]), strict=True):
        assert error(one, other) < TOLERANCE[dtype]


def test_tokens_one_by_one_equal_the_sequence_and_no_tokens_change_nothing():
    case = Case(tokens=9, heads=2, keys=20, values=12, slots=24, state=True)
    x = {name: value.float() for name, value in draw(case).items()}
    state = [x["first"], x["second"]]
    rows = [x[name] for name in ("q", "k", "v", "log_decay")]
    with dispatch.kernels("triton"):
        out, final = slots_chunk(*rows[:3], None, rows[3], documents(case), tuple(state))
        nothing, same = slots_chunk(
            *(y[:, :0] for y in rows[:3]), None, rows[3][:, :0], documents(case)[:, :0], tuple(state)
        )
        moving = [y.clone() for y in state]
        steps = [slots_step(*(y[:, t] for y in rows[:3]), None, rows[3][:, t], *moving) for t in range(9)]
    assert nothing.shape == (1, 0, 2, 12)
    for ours, theirs in zip((torch.stack(steps, 1), *moving, *same), (out, *final, *state), strict=True):
        assert error(ours, theirs) < TOLERANCE[torch.float32]


def test_values_that_decay_take_no_bonus_in_triton():
    x = {name: value.float() for name, value in draw(Case(None)).items()}
    rows = [x[name] for name in ("q", "k", "v", "log_decay")]
    bonus = torch.ones(1, 16, device=DEVICE)
    with dispatch.kernels("triton"), pytest.raises(KernelError, match="bonus: values that decay take none"):
        gated_linear_chunk(*rows, None, None, bonus=bonus, normalize=False, decay_values=True)
