"""The contract of every recurrent operator: its loop over tokens, its chunks and its single steps are one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from kernel_calls import normal
from torch import Tensor

Tensors = dict[str, Tensor]
Result = tuple[Sequence[Tensor], Sequence[Tensor]]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
BATCH = 2


@dataclass(frozen=True)
class Recurrence:
    """An operator with its options fixed.

    Attributes:
        sequence: tokens -> named inputs [B, T, ...] in float64.
        state: a carried state, each [B, ...] in float64.
        reference, chunk: named inputs, document numbers, state -> outputs and new state.
        step: named inputs of one token [B, ...], state (written in place) -> outputs.
        neutral: inputs that are zero at a token that nobody may see.
        shared: named inputs without a token dimension.
    """

    sequence: Callable[[int], Tensors]
    state: Sequence[Tensor]
    reference: Callable[[Tensors, Tensor, Sequence[Tensor]], Result]
    chunk: Callable[[Tensors, Tensor, Sequence[Tensor]], Result]
    step: Callable[[Tensors, Sequence[Tensor]], Sequence[Tensor]]
    neutral: tuple[str, ...]
    shared: Tensors = field(default_factory=dict)


def one_document(tokens: int) -> Tensor:
    return torch.zeros(BATCH, tokens, dtype=torch.int64)


def some_documents(tokens: int) -> Tensor:
    """Row 0: the carried document goes on for a while, then ones of many lengths. Row 1: a start at token 0."""
    starts = torch.zeros(BATCH, tokens, dtype=torch.int64)
    for row, positions in enumerate([(5, 6, 40, 64, 100), (0, 3, 70, 128)]):
        starts[row, [position for position in positions if position < tokens]] = 1
    return starts.cumsum(1)


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        assert one.isfinite().all() and other.isfinite().all()
        scale = max(1.0, other.abs().max().item()) if other.numel() else 1.0
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=tolerance * scale)


def check_chunk(case: Recurrence, tokens: int, dtype: torch.dtype) -> None:
    """Chunks in `dtype` against the loop in float64: outputs and state."""
    inputs, docs = case.sequence(tokens) | case.shared, some_documents(tokens)
    outputs, state = case.reference(inputs, docs, case.state)
    narrow = {name: x.to(dtype) for name, x in inputs.items()}
    ours, our_state = case.chunk(narrow, docs, [x.to(dtype) for x in case.state])
    assert all(x.dtype == dtype for x in [*ours, *our_state])
    assert_close([*ours, *our_state], [*outputs, *state], TOLERANCE[dtype])


def check_steps(case: Recurrence, tokens: int, dtype: torch.dtype) -> None:
    """One token after the other, in place, against the loop in float64."""
    inputs = case.sequence(tokens)
    outputs, final = case.reference(inputs | case.shared, one_document(tokens), case.state)
    shared = {name: x.to(dtype) for name, x in case.shared.items()}
    state = [x.to(dtype, copy=True) for x in case.state]
    steps = [
        case.step({n: x[:, t].to(dtype) for n, x in inputs.items()} | shared, state) for t in range(tokens)
    ]
    ours = [torch.stack(tensors, 1) for tensors in zip(*steps, strict=True)]
    assert_close([*ours, *state], [*outputs, *final], TOLERANCE[dtype])


def check_split(case: Recurrence, tokens: int, at: int) -> None:
    """Two calls with the state between them against one call."""
    inputs, docs = case.sequence(tokens), some_documents(tokens)
    outputs, final = case.chunk(inputs | case.shared, docs, case.state)
    head, state = case.chunk(
        {n: x[:, :at] for n, x in inputs.items()} | case.shared, docs[:, :at], case.state
    )
    later = docs[:, at:] - (docs[:, at - 1 : at] if at else 0)
    tail, state = case.chunk({n: x[:, at:] for n, x in inputs.items()} | case.shared, later, state)
    ours = [torch.cat(pair, 1) for pair in zip(head, tail, strict=True)]
    assert_close([*ours, *state], [*outputs, *final], 1e-10)


def check_gradients(case: Recurrence, tokens: int, dtype: torch.dtype = torch.float64) -> None:
    """Gradients of every input and of the carried state, chunks in `dtype` against the loop in float64."""

    def gradients(form: Callable[..., Result], dtype: torch.dtype) -> list[Tensor]:
        inputs = {n: x.to(dtype).requires_grad_() for n, x in (case.sequence(tokens) | case.shared).items()}
        state = [x.to(dtype, copy=True).requires_grad_() for x in case.state]
        outputs, final = form(inputs, some_documents(tokens), state)
        wanted = [normal(*x.shape, seed=seed).to(dtype) for seed, x in enumerate([*outputs, *final])]
        total = sum((x * w).sum() for x, w in zip([*outputs, *final], wanted, strict=True))
        return list(torch.autograd.grad(total, [*inputs.values(), *state]))

    assert_close(
        gradients(case.chunk, dtype), gradients(case.reference, torch.float64), 10 * TOLERANCE[dtype]
    )


def check_padding(case: Recurrence, tokens: int, padding: int) -> None:
    """Tokens with neutral inputs, before and within: the others come out as if they were not there."""
    inputs = case.sequence(tokens + 2 * padding)
    keep = torch.ones(tokens + 2 * padding, dtype=torch.bool)
    keep[:padding] = keep[-2 * padding : -padding] = False
    for name in case.neutral:
        inputs[name] = inputs[name] * keep.view(1, -1, *(1,) * (inputs[name].dim() - 2))
    padded, state = case.chunk(inputs | case.shared, one_document(len(keep)), case.state)
    without = {name: x[:, keep] for name, x in inputs.items()} | case.shared
    outputs, final = case.reference(without, one_document(tokens), case.state)
    assert_close([*(x[:, keep] for x in padded), *state], [*outputs, *final], 1e-10)


def check_no_tokens(case: Recurrence) -> None:
    """An empty call gives empty outputs and the state as it was."""
    outputs, state = case.chunk(case.sequence(0) | case.shared, one_document(0), case.state)
    assert all(x.shape[:2] == (BATCH, 0) for x in outputs)
    assert_close(state, case.state, 0.0)


def forms(found: Mapping[str, Recurrence]) -> type:
    """The contract as tests of these cases: `TestForms = forms(CASES)` in an operator's file."""
    cases = pytest.mark.parametrize("case", found.values(), ids=found)
    dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])

    class Forms:
        @cases
        @dtypes
        @pytest.mark.parametrize("tokens", [1, 7, 64, 131])
        def test_chunks_equal_the_loop(self, case, dtype, tokens):
            check_chunk(case, tokens, dtype)

        @cases
        @dtypes
        def test_steps_equal_the_loop(self, case, dtype):
            check_steps(case, 37, dtype)

        @cases
        @pytest.mark.parametrize("at", [0, 1, 64, 90])
        def test_state_is_carried_across_a_split(self, case, at):
            check_split(case, 131, at)

        @cases
        @dtypes
        def test_gradients_equal_those_of_the_loop(self, case, dtype):
            check_gradients(case, 71, dtype)

        @cases
        def test_padding_changes_nothing(self, case):
            check_padding(case, 60, 9)

        @cases
        def test_no_tokens(self, case):
            check_no_tokens(case)

    return Forms
