"""Short causal convolution: three forms of one function, and torch's own convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_calls import normal
from recurrences import (
    BATCH,
    Recurrence,
    check_chunk,
    check_gradients,
    check_no_tokens,
    check_split,
    check_steps,
    one_document,
    some_documents,
)

from linearize.kernels.short_conv import short_conv_chunk, short_conv_reference, short_conv_step

HEADS, WIDTH = 3, 5


def make(taps: int, *, bias: bool = False, **options: bool) -> Recurrence:
    def whole(form):
        def run(x, docs, state):
            out, new = form(**x, docs=docs, state=state[0], **options)
            return [out], [new]

        return run

    shared = {"weight": normal(HEADS, WIDTH, taps, seed=2)}
    return Recurrence(
        sequence=lambda tokens: {"x": normal(BATCH, tokens, HEADS, WIDTH, seed=1)},
        state=[normal(BATCH, taps - 1, HEADS, WIDTH, seed=3)],
        reference=whole(short_conv_reference),
        chunk=whole(short_conv_chunk),
        step=lambda x, state: [short_conv_step(**x, state=state[0], **options)],
        neutral=("x",),
        shared=shared | ({"bias": normal(HEADS, WIDTH, seed=4)} if bias else {}),
    )


CASES = {
    "four": make(4),
    "one": make(1),
    "two-residual": make(2, residual=True),
    "four-silu": make(4, silu=True),
    "four-bias-silu-residual": make(4, bias=True, silu=True, residual=True),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


@cases
@dtypes
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 71])
def test_all_at_once_equals_the_loop(case, dtype, tokens):
    check_chunk(case, tokens, dtype)


@cases
@dtypes
def test_steps_equal_the_loop(case, dtype):
    check_steps(case, 19, dtype)


@cases
@pytest.mark.parametrize("at", [0, 1, 2, 5, 6, 50])
def test_state_is_carried_across_a_split(case, at):
    check_split(case, 71, at)


@cases
@dtypes
@pytest.mark.parametrize("tokens", [2, 45])
def test_gradients_equal_those_of_the_loop(case, dtype, tokens):
    check_gradients(case, tokens, dtype)


@cases
def test_no_tokens(case):
    check_no_tokens(case)


def test_zero_inputs_in_front_change_nothing():
    case = make(4)
    x, weight, empty = case.sequence(20)["x"], case.shared["weight"], torch.zeros_like(case.state[0])
    expected, _ = short_conv_chunk(x, weight, one_document(20), empty)
    padded = F.pad(x, (0, 0, 0, 0, 9, 0))
    out, _ = short_conv_chunk(padded, weight, one_document(29), empty)
    torch.testing.assert_close(out[:, 9:], expected)
    assert (out[:, :9] == 0).all()


def test_equals_a_depthwise_convolution():
    case = make(4)
    x, weight, empty = case.sequence(30)["x"], case.shared["weight"], torch.zeros_like(case.state[0])
    channels = F.pad(x.flatten(2).mT, (3, 0))
    expected = F.conv1d(channels, weight.flatten(0, 1)[:, None], groups=HEADS * WIDTH).mT.unflatten(
        2, (HEADS, WIDTH)
    )
    torch.testing.assert_close(short_conv_chunk(x, weight, one_document(30), empty)[0], expected)


def test_last_tap_of_one_is_the_identity():
    case = make(4)
    x, weight = case.sequence(71)["x"], torch.zeros_like(case.shared["weight"])
    weight[..., -1] = 1
    torch.testing.assert_close(short_conv_chunk(x, weight, some_documents(71), case.state[0])[0], x)
