"""gated_linear in Triton against the loop over tokens in float64: outputs, states, every gradient, every decay."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from functools import cache

import kernel_calls
import pytest
import torch
from kernel_calls import DEVICE, NARROW, TOLERANCE, normal
from rounded_operands import rounded_operand
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.gated_linear import (
    gated_linear_chunk,
    gated_linear_reference,
    gated_linear_step,
    triton_key_sums,
)
from linearize.kernels.gated_linear.operator import gated_linear_triton
from linearize.kernels.linear import linear_chunk
from linearize.kernels.slots import slots_chunk

error = functools.partial(kernel_calls.error, least=1e-1)
STRENGTHS = {
    "none": lambda u: 0 * u,
    "weak": lambda u: -0.1 * u,
    "mild": lambda u: -u,
    "strong": lambda u: -20 * u,
    "mixed": lambda u: -torch.where(u > 0.8, 20.0 * u, 0.01 * u),
    "huge": lambda u: -torch.where(u > 0.9, 3000.0 * u, 0.02 * u),
}


@dataclass(frozen=True)
class Case:
    """One shape with its options; `over` is what has a decay of its own: nothing, a "head" or a "key" dimension."""

    over: str | None = None
    strength: str = "mild"
    tokens: int = 70
    heads: int = 1
    state_heads: int = 1
    features: int = 16
    values: int = 16
    normalize: bool = True
    documents: bool = False
    read_before: bool = False
    bonus: bool = False
    state: bool = False
    segments: int = 0
    batch: int = 1


def both(case: Case) -> dict[str, Case]:
    """The same with a decay of the head and with one of every key dimension."""
    return {over: replace(case, over=over) for over in ("head", "key")}


CASES = {
    "plain": Case(),
    "plain-sums_only": Case(normalize=False, documents=True, state=True, tokens=140),
    "plain-segments": Case(tokens=300, segments=3, state=True, documents=True, normalize=False),
    "plain-blocks": Case(features=256, values=128),
}
for name, case in {
    "mild": Case(),
    "one": Case(tokens=1, batch=2, state=True),
    "short": Case(tokens=7),
    "strong": Case(strength="strong"),
    "mixed": Case(strength="mixed", tokens=100),
    "huge": Case(strength="huge", documents=True),
    "grouped": Case(strength="weak", heads=2, state_heads=1, documents=True, state=True),
    "documents": Case(tokens=135, strength="weak", batch=2, documents=True, state=True),
    "before": Case(strength="mixed", read_before=True, documents=True, state=True),
    "bonus": Case(strength="mild", bonus=True, heads=2, state_heads=1),
    "segments": Case(tokens=270, strength="weak", segments=3, state=True, documents=True),
    "sums_only": Case(strength="weak", normalize=False, state=True, segments=2, tokens=150),
    "odd_widths": Case(features=20, values=24, state=True),
}.items():
    CASES |= {f"{over}-{name}": one for over, one in both(case).items()}
CASES["head-blocks"] = Case(over="head", features=256, values=128)
CASES["key-blocks"] = Case(over="key", features=128, values=64)
# the interpreter is slow, and float16 takes the same way through the kernels but for its roundings
TWICE = {
    "plain",
    "head-mixed",
    "head-grouped",
    "head-blocks",
    "key-strong",
    "key-grouped",
    "key-segments",
    "key-before",
}
PAIRS = {
    f"{name}-{str(dtype).removeprefix('torch.')}": (case, dtype)
    for name, case in CASES.items()
    for dtype in (NARROW if DEVICE == "cuda" or name in TWICE else NARROW[:1])
}
RARELY = {
    "head-mild",
    "head-one",
    "head-strong",
    "head-mixed",
    "head-sums_only",
    "key-mild",
    "key-documents",
    "key-strong",
    "key-sums_only",
    "key-odd_widths",
}


def draw(case: Case) -> dict[str, Tensor]:
    """Random float64 inputs of a call; padding (zero key, zero log decay) in front and in the middle."""
    size = (case.batch, case.tokens, case.state_heads)
    keep = torch.ones(case.batch, case.tokens, dtype=torch.float64)
    if case.documents:
        keep[0, :3] = keep[-1, case.tokens // 2] = 0
    found = {
        "q": normal(case.batch, case.tokens, case.heads, case.features, seed=1),
        "k": normal(*size, case.features, seed=2) * keep[..., None, None],
        "v": normal(*size, case.values, seed=3),
    }
    if case.over is not None:
        width = (case.features,) if case.over == "key" else ()
        uniform = torch.rand(*size, *width, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        found["log_decay"] = STRENGTHS[case.strength](uniform) * keep.view(
            *keep.shape, 1, *(1 for _ in width)
        )
    if case.bonus:
        found["bonus"] = normal(case.state_heads, case.features, seed=5)
    if case.state:
        found["sums"] = normal(case.batch, case.state_heads, case.features, case.values, seed=6)
        if case.normalize:
            found["norms"] = normal(case.batch, case.state_heads, case.features, seed=7)
    return {name: x.to(DEVICE) for name, x in found.items()}


def documents(case: Case) -> Tensor | None:
    """Row 0: the carried document goes on for a while, then ones of many lengths. Row 1: a start at token 0."""
    if not case.documents:
        return None
    return kernel_calls.documents(case.batch, case.tokens, (5, 6, 40, 64, 100, 128, 270), (0, 3, 70, 130))


def run(case: Case, dtype: torch.dtype, form: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Results and gradients by name."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    narrow = ("q", "k", "v", "bonus") if case.over != "head" else ("q", "k", "v", "bonus", "log_decay")
    x = {n: value.to(dtype if n in narrow else wide).requires_grad_() for n, value in draw(case).items()}
    docs = documents(case)
    state = (x["sums"], x.get("norms")) if case.state else None
    options = {"bonus": x.get("bonus"), "read_before": case.read_before, "normalize": case.normalize}
    if form == "reference":
        zeros = x["k"].new_zeros(x["k"].shape[:3])
        docs = (
            torch.zeros(case.batch, case.tokens, dtype=torch.int64, device=DEVICE) if docs is None else docs
        )
        if state is None:
            empty = x["k"].new_zeros(case.batch, case.state_heads, case.features, case.values)
            state = (empty, empty[..., 0] if case.normalize else None)
        result = gated_linear_reference(
            x["q"], x["k"], x["v"], x.get("log_decay", zeros), docs, state, **options
        )
    else:
        with dispatch.kernels("triton"):
            result = gated_linear_triton(
                x["q"], x["k"], x["v"], x.get("log_decay"), docs, state, segments=case.segments, **options
            )
    numerator, denominator, (sums, norms) = result
    found = {"numerator": numerator, "sums": sums}
    if case.normalize:
        found |= {"denominator": denominator, "norms": norms}
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
    assert found["numerator"].dtype == dtype
    assert all(found[name].dtype == torch.float32 for name in found if name != "numerator")
    errors = {name: error(found[name], results[name]) for name in results}
    errors |= {f"d{name}": error(grads[name], gradients[name]) / 3 for name in grads}
    assert max(errors.values()) < TOLERANCE[dtype], errors


@pytest.mark.skipif(
    DEVICE == "cuda", reason="the products' operands are replaced, which the interpreter alone allows"
)
@pytest.mark.parametrize(
    "case", [Case("key", "mild"), Case("key", "strong"), Case("key", "strong", read_before=True)]
)
def test_rounded_operands_cost_the_decays_no_more_than_others(case, monkeypatch):
    """What pairs on one side of a strong decay give it cancels, however operands are rounded: here as bfloat16 is."""
    monkeypatch.setattr(triton_key_sums, "under_decay", rounded_operand)
    wanted, found = exact(case)[1], run(case, torch.float32, "triton")[1]
    errors = {name: error(found[name], wanted[name]) for name in wanted}
    assert 1e-4 < errors["k"] < 5e-3 and errors["log_decay"] < 5e-3, errors


def step_inputs(case: Case, over: str | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """One token's inputs, with log decays of nothing, the head, the keys or the values."""
    size = (case.batch, case.state_heads)
    found = {
        "q": normal(case.batch, case.heads, case.features, seed=1),
        "k": normal(*size, case.features, seed=2),
        "v": normal(*size, case.values, seed=3),
    }
    if over is not None:
        found["log_decay"] = -normal(
            *size, *{"head": (), "key": (case.features,), "value": (case.values,)}[over], seed=4
        ).abs()
    if case.bonus:
        found["bonus"] = normal(case.state_heads, case.features, seed=5)
    return {name: x.to(DEVICE, dtype) for name, x in found.items()}


@pytest.mark.parametrize("over", [None, "head", "key", "value"])
@pytest.mark.parametrize("option", ["after", "read_before", "bonus"])
@pytest.mark.parametrize("dtype", NARROW, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_one_token_in_place_equals_torch(over, option, dtype):
    case = Case(batch=2, heads=6, state_heads=2, features=20, values=40, bonus=option == "bonus")
    x = step_inputs(case, over, dtype)
    options = {"read_before": option == "read_before", "decay_values": over == "value"}
    sums = normal(2, 2, 20, 40, seed=6).to(DEVICE, torch.float32)
    norms = None if over == "value" else normal(2, 2, 20, seed=7).to(DEVICE, torch.float32)
    decay, rest = x.pop("log_decay", None), [x.pop(name) for name in "qkv"]
    states = [
        [y if y is None else y.to(kind, copy=True) for y in (sums, norms)]
        for kind in (torch.float32, torch.float64)
    ]
    with dispatch.kernels("triton"):
        ours = gated_linear_step(*rest, decay, *states[0], **x, **options)
    wide = [y if y is None else y.double() for y in (*rest, decay)]
    theirs = gated_linear_step(*wide, *states[1], **{n: y.double() for n, y in x.items()}, **options)
    assert ours[0].dtype == dtype
    for one, other in zip((*ours, *states[0]), (*theirs, *states[1]), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert error(one, other) < TOLERANCE[dtype]


@pytest.mark.parametrize("over", [None, "head", "key"])
def test_tokens_one_by_one_equal_the_sequence(over):
    case = Case(over=over, tokens=9, heads=2, state_heads=1)
    x = {name: value.float() for name, value in draw(case).items()}
    state = [torch.zeros(1, 1, 16, 16, device=DEVICE), torch.zeros(1, 1, 16, device=DEVICE)]
    with dispatch.kernels("triton"):
        out, total, final = gated_linear_chunk(x["q"], x["k"], x["v"], x.get("log_decay"), None, None)
        steps = [
            gated_linear_step(
                *(None if y is None else y[:, t] for y in (x["q"], x["k"], x["v"], x.get("log_decay"))),
                *state,
            )
            for t in range(9)
        ]
    for ours, theirs in zip(zip(*steps, strict=True), (out, total), strict=True):
        assert error(torch.stack(ours, 1), theirs) < TOLERANCE[torch.float32]
    for ours, theirs in zip(state, final, strict=True):
        assert error(ours, theirs) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("over", [None, "head", "key"])
def test_no_tokens_and_a_split(over):
    """Nothing gives the state back, with its gradient; a cut anywhere changes nothing."""
    case = Case(over=over, tokens=150, strength="weak", state=True)
    x = {name: value.float() for name, value in draw(case).items()}
    state = (x.pop("sums").requires_grad_(), x.pop("norms").requires_grad_())
    x.setdefault("log_decay", None)

    def piece(low: int, high: int, carried):
        part = {n: y if y is None else y[:, low:high].requires_grad_() for n, y in x.items()}
        return gated_linear_chunk(**part, docs=None, state=carried)

    with dispatch.kernels("triton"):
        nothing, _, same = piece(0, 0, state)
        assert nothing.shape == (1, 0, 1, 16)
        for given, back in zip(state, same, strict=True):
            assert torch.equal(given, back)
            assert torch.equal(
                torch.autograd.grad(back.sum(), given, retain_graph=True)[0], torch.ones_like(given)
            )
        whole, whole_sum, final = piece(0, 150, state)
        first, first_sum, middle = piece(0, 70, state)
        second, second_sum, last = piece(70, 150, middle)
    ours = [torch.cat([first, second], 1), torch.cat([first_sum, second_sum], 1), *last]
    for one, other in zip(ours, (whole, whole_sum, *final), strict=True):
        assert error(one, other) < TOLERANCE[torch.float32]
    for one, other in zip(
        *(torch.autograd.grad(y.sum(), state) for y in (second, whole[:, 70:])), strict=True
    ):
        assert error(one, other) < 3 * TOLERANCE[torch.float32]


def test_linear_attention_and_slots_take_the_same_kernels():
    case = Case(over="key", tokens=80, heads=2, documents=True, state=True)
    x = {name: value.float() for name, value in draw(case).items()}
    docs, state = documents(case), (x["sums"], x["norms"])
    results = []
    for form in ("triton", "torch"):
        with dispatch.kernels(form):
            out, total, final = linear_chunk(x["q"], x["k"], x["v"], docs, state)
            writes = -x["log_decay"].expm1()
            slots, after = slots_chunk(
                x["q"], x["k"], x["v"], writes, x["log_decay"], docs, (x["sums"], x["sums"])
            )
            results.append([out, total, *final, slots, *after])
    for one, other in zip(*results, strict=True):
        assert error(one, other) < TOLERANCE[torch.float32]


def test_what_is_not_contiguous_is_read_as_it_stands():
    case = Case(over="key", tokens=66, heads=2, state_heads=2)
    x = {name: value.float() for name, value in draw(case).items()}
    strided = {name: value.transpose(1, 2).contiguous().transpose(1, 2) for name, value in x.items()}
    assert not strided["q"].is_contiguous()
    with dispatch.kernels("triton"):
        one, other = (gated_linear_chunk(**y, docs=None, state=None) for y in (x, strided))
    assert torch.equal(one[0], other[0]) and torch.equal(one[2][0], other[2][0])


def test_what_is_not_covered_is_refused_with_a_remedy():
    x = torch.zeros(1, 3, 1, 300, device=DEVICE)
    with dispatch.kernels("triton"):
        with pytest.raises(dispatch.KernelError, match=r"features: 300.*LINEARIZE_KERNELS=torch"):
            gated_linear_chunk(x, x, x, None, None, None)
        with pytest.raises(dispatch.KernelError, match="dtype"):
            gated_linear_chunk(x[..., :16], x[..., :16].half(), x[..., :16], None, None, None)
        with pytest.raises(
            dispatch.KernelError, match="state: sums and norms must be float32 and contiguous"
        ):
            gated_linear_step(*(x[:, 0, :, :16],) * 3, None, x.new_zeros(1, 1, 16, 16).mT)


@pytest.mark.parametrize("over", [None, "key"])
def test_compiles_and_checkpoints(over):
    """One graph under torch.compile, and recomputation under gradient checkpointing gives the same gradients."""
    case = Case(over=over)
    x = {name: value.float().requires_grad_() for name, value in draw(case).items()}
    x.setdefault("log_decay", None)
    leaves = [value for value in x.values() if value is not None]

    def layer(q, k, v, log_decay):
        out, total, _ = gated_linear_chunk(q * 1.0, k, v, log_decay, None, None)
        return out.square() + total[..., None]

    with dispatch.kernels("triton"):
        plain = torch.autograd.grad(layer(**x).sum(), leaves)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        again = functools.partial(torch.utils.checkpoint.checkpoint, layer, use_reentrant=False)
        for form in (compiled, again):
            for one, two in zip(torch.autograd.grad(form(**x).sum(), leaves), plain, strict=True):
                assert error(one, two) < 1e-6
