"""short_conv of several streams, in Triton and in torch, against its loop in float64: outputs, states, gradients."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from kernel_calls import DEVICE, INTERPRETED, normal
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.short_conv import (
    short_conv_chunk,
    short_conv_reference,
    short_conv_step,
    short_conv_step_streams,
    short_conv_streams,
)
from linearize.mixers.base import LayerShape
from linearize.mixers.short_conv.depthwise import Depthwise
from linearize.mixers.state import State

FORMS = [
    ("torch", torch.float64),
    ("torch", torch.float32),
    ("triton", torch.float32),
    ("triton", torch.float16),
]
FORMS += [("torch", torch.bfloat16)]
if DEVICE == "cuda":
    FORMS += [("triton", torch.bfloat16)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.fixture(autouse=True)
def interpreter() -> None:
    if DEVICE == "cpu" and not dispatch.interpreted():
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")


@dataclass(frozen=True)
class Case:
    """A call; `codes`: documents with padding inside and at both ends."""

    tokens: int = 75
    sizes: tuple[tuple[int, int], ...] = ((4, 16), (2, 16), (2, 24))
    taps: int = 4
    bias: bool = False
    silu: bool = False
    residual: bool = False
    codes: bool = False
    carried: bool = False

    @property
    def options(self) -> dict[str, bool]:
        return {"silu": self.silu, "residual": self.residual}


CASES = {
    "plain": Case(),
    "everything": Case(
        tokens=37,
        bias=True,
        silu=True,
        residual=True,
        codes=True,
        carried=True,
        sizes=((2, 16), (1, 16), (1, 24)),
    ),
    "documents": Case(codes=True, sizes=((3, 16), (1, 8))),
    "activation": Case(tokens=21, silu=True, sizes=((5, 16), (1, 16))),
    "two taps": Case(taps=2, codes=True, silu=True, sizes=((2, 16),)),
    "three taps": Case(taps=3, residual=True, carried=True, sizes=((2, 16), (2, 16))),
    "eight taps": Case(tokens=25, taps=8, codes=True, carried=True, bias=True, silu=True, sizes=((1, 16),)),
    "eight taps without activation": Case(taps=8, sizes=((1, 16),)),
    "one tap": Case(taps=1, bias=True, carried=True, sizes=((1, 16),)),
    "odd widths": Case(sizes=((1, 5), (3, 7)), carried=True, codes=True),
    "fewer tokens than taps": Case(tokens=2, codes=True, carried=True, sizes=((1, 16), (1, 8))),
    "one token": Case(tokens=1, carried=True, silu=True, sizes=((1, 16),)),
    "several programs": Case(tokens=261, codes=True, carried=True, sizes=((1, 16),)),
    "several programs, activation": Case(tokens=131, codes=True, silu=True, sizes=((1, 16),)),
    "wide head": Case(tokens=20, codes=True, sizes=((2, 64), (1, 64), (1, 64))),
}
BATCH = 2


def draw_codes(tokens: int) -> Tensor:
    """Row 0 goes on with the carried document; row 1 opens a new one at once. Padding ahead, inside and behind."""
    starts = torch.zeros(BATCH, tokens, dtype=torch.int64)
    for row, positions in enumerate([(9, 10, 40, 64, 128), (0, 3, 61, 200)]):
        starts[row, [p for p in positions if p < tokens]] = 1
    numbers, padding = starts.cumsum(1), torch.zeros(BATCH, tokens, dtype=torch.bool)
    padding[0, :1] = padding[1, 20:24] = True
    padding[0, -2:] = tokens > 2
    return torch.where(padding, -1 - numbers, numbers).to(torch.int32)


def draw(case: Case, dtype: torch.dtype) -> dict[str, list[Tensor] | None]:
    """Tensors as `dtype` holds them, in float64: rounding of the inputs is no error of the kernel."""

    def made(*size: int, seed: int) -> Tensor:
        return normal(*size, seed=seed).to(dtype).double()

    streams = list(enumerate(case.sizes))
    return {
        "inputs": [made(BATCH, case.tokens, *size, seed=i) for i, size in streams],
        "weights": [made(*size, case.taps, seed=10 + i) for i, size in streams],
        "biases": [made(*size, seed=20 + i) for i, size in streams] if case.bias else None,
        "states": [made(BATCH, case.taps - 1, *size, seed=30 + i) for i, size in streams]
        if case.carried
        else None,
    }


def reference(case: Case, tensors: dict[str, list[Tensor] | None]) -> tuple[list[Tensor], list[Tensor]]:
    codes = draw_codes(case.tokens) if case.codes else torch.zeros(BATCH, case.tokens, dtype=torch.int32)
    numbers, seen = torch.where(codes < 0, -1 - codes, codes), (codes >= 0).double()[..., None, None]
    outputs, finals = [], []
    for index, (x, weight) in enumerate(zip(tensors["inputs"], tensors["weights"], strict=True)):
        states, biases = tensors["states"], tensors["biases"]
        state = x.new_zeros(BATCH, case.taps - 1, *x.shape[2:]) if states is None else states[index]
        y, final = short_conv_reference(
            x * seen, weight, numbers, state, bias=None if biases is None else biases[index], **case.options
        )
        outputs.append(y)
        finals.append(final)
    return outputs, finals


def flat(tensors: dict[str, list[Tensor] | None]) -> list[Tensor]:
    return [x for xs in tensors.values() if xs is not None for x in xs]


def on_device(tensors: dict[str, list[Tensor] | None], dtype: torch.dtype, grad: bool) -> dict:
    return {
        name: None if xs is None else [x.to(DEVICE, dtype).requires_grad_(grad) for x in xs]
        for name, xs in tensors.items()
    }


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    actual = actual.detach().double().cpu()
    assert actual.isfinite().all()
    assert (actual - expected).norm() <= tolerance * expected.norm() + 1e-12


def run(case: Case, form: str, tensors: dict, **options: bool) -> tuple[list[Tensor], list[Tensor] | None]:
    codes = draw_codes(case.tokens).to(DEVICE) if case.codes else None
    with dispatch.kernels(form):
        return short_conv_streams(**tensors, codes=codes, **case.options, **options)


ONCE = {"several programs", "several programs, activation", "eight taps", "activation", "wide head"}
"""Cases of many programs or taps, which the interpreter is never asked for in float16."""
RARELY = {
    "plain",
    "activation",
    "three taps",
    "eight taps without activation",
    "several programs",
    "wide head",
}
RUNS = [
    pytest.param(
        form,
        dtype,
        name,
        id=f"{form}-{str(dtype)[6:]}-{name}",
        marks=INTERPRETED if form == "triton" and name in RARELY else [],
    )
    for form, dtype in FORMS
    for name in CASES
]


@pytest.mark.parametrize(("form", "dtype", "name"), RUNS)
def test_outputs_states_and_gradients(name: str, form: str, dtype: torch.dtype) -> None:
    if DEVICE == "cpu" and dtype == torch.float16 and name in ONCE:
        pytest.skip("slow in the interpreter")
    case = CASES[name]
    tensors = draw(case, dtype)
    leaves = [x.requires_grad_() for x in flat(tensors)]
    outputs, finals = reference(case, tensors)
    wanted = [normal(*x.shape, seed=50 + i).to(dtype) for i, x in enumerate([*outputs, *finals])]
    total = sum((x * w.double()).sum() for x, w in zip([*outputs, *finals], wanted, strict=True))
    expected = torch.autograd.grad(total, leaves, allow_unused=True)

    ours = on_device(
        {n: None if xs is None else [x.detach() for x in xs] for n, xs in tensors.items()}, dtype, True
    )
    found, states = run(case, form, ours, return_state=True)
    assert all(x.dtype == dtype for x in [*found, *states])
    for x, y in zip([*found, *states], [*outputs, *finals], strict=True):
        close(x, y.detach(), TOLERANCE[dtype])
    sides = [(x, w.to(DEVICE)) for x, w in zip([*found, *states], wanted, strict=True)]
    torch.autograd.backward([x for x, _ in sides], [w for _, w in sides])
    for leaf, gradient in zip(flat(ours), expected, strict=True):
        assert leaf.grad.dtype == dtype
        close(
            leaf.grad,
            torch.zeros_like(leaf, device="cpu").double() if gradient is None else gradient,
            TOLERANCE[dtype],
        )


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_without_state_and_with_frozen_inputs(form: str) -> None:
    """What training asks for: no state either way; gradients of some leaves only; one output left unused."""
    case = Case(tokens=20, silu=True, sizes=((2, 16), (1, 16)))
    tensors = draw(case, torch.float32)
    ours = on_device(tensors, torch.float32, False)
    ours["weights"][0].requires_grad_()
    found, states = run(case, form, ours)
    assert states is None
    found[0].sum().backward()
    tensors["weights"][0].requires_grad_()
    outputs, _ = reference(case, tensors)
    (expected,) = torch.autograd.grad(outputs[0].sum(), tensors["weights"][0])
    close(ours["weights"][0].grad, expected, 1e-5)
    assert ours["inputs"][0].grad is None


@pytest.mark.parametrize("at", [1, 2, 37])
def test_state_is_carried_across_a_split(at: int) -> None:
    case = Case(tokens=41, silu=True)
    tensors = on_device(draw(case, torch.float32), torch.float32, False)
    whole, final = run(case, "triton", tensors, return_state=True)
    head, state = run(
        case, "triton", {**tensors, "inputs": [x[:, :at] for x in tensors["inputs"]]}, return_state=True
    )
    rest = {**tensors, "inputs": [x[:, at:] for x in tensors["inputs"]], "states": state}
    tail, last = run(case, "triton", rest, return_state=True)
    for index, y in enumerate(whole):
        torch.testing.assert_close(torch.cat([head[index], tail[index]], 1), y, rtol=1e-5, atol=1e-6)
        assert torch.equal(last[index], final[index])


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize(
    "name", ["everything", "activation", "two taps", "eight taps", "one tap", "odd widths"]
)
def test_steps_equal_the_loop(name: str, form: str) -> None:
    case = CASES[name]
    case = Case(**{**vars(case), "tokens": 11, "carried": True, "codes": False})
    tensors = draw(case, torch.float32)
    valid = torch.ones(BATCH, case.tokens, dtype=torch.bool)
    valid[0, 4:6] = False
    outputs, finals = reference(case, tensors)
    # a row with padding is the row without
    shorter = {**tensors, "inputs": [x[:, valid[0]] for x in tensors["inputs"]]}
    first, first_finals = reference(Case(**{**vars(case), "tokens": case.tokens - 2}), shorter)
    ours = on_device(tensors, torch.float32, False)
    states, places = ours["states"], [x.data_ptr() for x in ours["states"]]
    made = []
    for t in range(case.tokens):
        # rows apart, as slices of a fused projection are
        fused = torch.cat([x[:, t].flatten(1) for x in ours["inputs"]], 1)
        parts = fused.split([h * d for h, d in case.sizes], 1)
        inputs = [x.unflatten(1, size) for x, size in zip(parts, case.sizes, strict=True)]
        with dispatch.kernels(form), torch.no_grad():
            made.append(
                short_conv_step_streams(
                    inputs,
                    ours["weights"],
                    states,
                    valid=valid[:, t].to(DEVICE),
                    biases=ours["biases"],
                    **case.options,
                )
            )
    for index, ys in enumerate(zip(*made, strict=True)):
        found = torch.stack(ys, 1)
        close(found[1:], outputs[index][1:], 1e-5)
        close(found[:1, valid[0]], first[index][:1], 1e-5)
        close(states[index][1:], finals[index][1:], 1e-6)
        close(states[index][:1], first_finals[index][:1], 1e-6)
    assert [x.data_ptr() for x in states] == places


def test_narrow_states_beside_wide_inputs() -> None:
    """Mixers widen what they compute with, and keep their state in the model's dtype."""
    case = Case(carried=True)
    tensors = on_device(draw(case, torch.float16), torch.float32, False)
    narrow = {**tensors, "states": [x.half() for x in tensors["states"]]}
    wide, finals = run(case, "triton", tensors, return_state=True)
    found, states = run(case, "triton", narrow, return_state=True)
    for index in range(3):
        assert torch.equal(found[index], wide[index]) and found[index].dtype == torch.float32
        assert states[index].dtype == torch.float16 and torch.equal(states[index], finals[index].half())


def test_single_stream_functions_take_the_same_kernels() -> None:
    case = Case(bias=True, silu=True, codes=False, carried=True, sizes=((2, 16),))
    tensors = draw(case, torch.float32)
    outputs, finals = reference(case, tensors)
    x, weight, bias, state = (
        on_device(tensors, torch.float32, False)[n][0] for n in ("inputs", "weights", "biases", "states")
    )
    docs = torch.zeros(BATCH, case.tokens, dtype=torch.int64, device=DEVICE)
    with dispatch.kernels("triton"):
        y, final = short_conv_chunk(x, weight, docs, state, bias=bias, silu=True)
        close(y, outputs[0], 1e-5)
        close(final, finals[0], 1e-6)
        first = short_conv_step(x[:, 0], weight, state, bias=bias, silu=True)
    close(first, outputs[0][:, 0], 1e-5)


@pytest.mark.parametrize("wide", [False, True], ids=["model's dtype", "widened"])
def test_the_mixers_part(wide: bool) -> None:
    """Prefill of two documents with padding, then tokens: as in torch, in a state of the model's dtype, in place."""
    shape = LayerShape(heads=2, kv_heads=1, key_dim=16, value_dim=8, scaling=1.0)
    part = Depthwise(Depthwise.Config(roles="qkv", activation="silu", others=0.3), shape).to(DEVICE)
    dtype = torch.float32 if wide else torch.float16
    q, k, v = (
        normal(BATCH, 12, *size, seed=i).half().to(DEVICE, dtype)
        for i, size in enumerate([(2, 16), (1, 16), (1, 8)])
    )
    valid = torch.ones(BATCH, 12, dtype=torch.bool, device=DEVICE)
    valid[0, :2] = False
    docs = (torch.arange(12, device=DEVICE) >= 5).long().expand(BATCH, 12)

    def run(form: str) -> tuple[list[Tensor], State]:
        state = State(part.initial(BATCH, torch.float16, torch.device(DEVICE)))
        places = [state[name].data_ptr() for name in state]
        found = []
        with dispatch.kernels(form), torch.no_grad():
            for a, b in ((0, 9), (9, 10), (10, 11), (11, 12)):
                # what is carried belongs to document 0 of each call
                own = docs[:, a:b] if a == 0 else torch.zeros_like(docs[:, a:b])
                found.append(
                    part(q[:, a:b], k[:, a:b], v[:, a:b], valid=valid[:, a:b], docs=own, state=state)
                )
        assert places == [state[name].data_ptr() for name in state]
        return [torch.cat(xs, 1) for xs in zip(*found, strict=True)], state

    (ours, state), (plain, expected) = run("triton"), run("torch")
    for x, y in zip(
        [*ours, *(state[n] for n in state)], [*plain, *(expected[n] for n in expected)], strict=True
    ):
        assert x.dtype == y.dtype
        close(x, y.double().cpu(), 1e-5 if wide else 1e-3)


@pytest.mark.parametrize("size", [(0, 5), (2, 0)])
def test_no_tokens_or_rows(size: tuple[int, int]) -> None:
    x, weight = torch.zeros(*size, 2, 8, device=DEVICE), torch.zeros(2, 8, 4, device=DEVICE)
    state = torch.ones(size[0], 3, 2, 8, device=DEVICE)
    with dispatch.kernels("triton"):
        outputs, finals = short_conv_streams([x], [weight], states=[state], return_state=True)
    assert outputs[0].shape == x.shape and torch.equal(finals[0], state)


@pytest.mark.parametrize("name", [pytest.param("documents", marks=INTERPRETED), "eight taps"])
def test_backward_is_deterministic(name: str) -> None:
    case = CASES[name]

    def gradients() -> list[Tensor]:
        ours = on_device(draw(case, torch.float32), torch.float32, True)
        found, _ = run(case, "triton", ours)
        sum(x.sum() for x in found).backward()
        return [x.grad for x in flat(ours)]

    assert all(torch.equal(x, y) for x, y in zip(gradients(), gradients(), strict=True))


def test_operators_are_well_formed() -> None:
    from linearize.kernels.short_conv import operator

    case = Case(tokens=5, sizes=((1, 8), (1, 4)), carried=True, bias=True, codes=True)
    ours = on_device(draw(case, torch.float32), torch.float32, True)
    lists = [ours[name] for name in ("inputs", "weights", "biases", "states")]
    arguments = (*lists, draw_codes(5).to(DEVICE), True, True, True)
    torch.library.opcheck(
        operator.forward,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    detached = [[x.detach() for x in xs] for xs in lists]
    one = (
        [x[:, 0] for x in detached[0]],
        *detached[1:],
        [torch.zeros_like(x[:, 0]) for x in detached[0]],
        torch.ones(2, dtype=torch.bool, device=DEVICE),
        True,
        False,
    )
    torch.library.opcheck(operator.step, one, test_utils=("test_schema", "test_faketensor"))


def test_what_is_not_covered_is_refused() -> None:
    x = torch.zeros(1, 4, 1, 8, device=DEVICE)
    with dispatch.kernels("triton"):
        with pytest.raises(dispatch.KernelError, match=r"taps: \[9\]: one number for all, 1 to 8"):
            short_conv_streams([x], [torch.zeros(1, 8, 9, device=DEVICE)])
        with pytest.raises(dispatch.KernelError, match="streams: 4 of them"):
            short_conv_streams([x] * 4, [torch.zeros(1, 8, 4, device=DEVICE)] * 4)
        with pytest.raises(dispatch.KernelError, match=r"weights: .* must be heads, width, taps"):
            short_conv_streams([x], [torch.zeros(2, 8, 4, device=DEVICE)])
