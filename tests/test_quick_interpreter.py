"""Launches in the interpreter that `quick_interpreter` has made quick compute what they do without it, to the bit."""

from __future__ import annotations

import pytest
import quick_interpreter
import torch

from linearize.kernels import dispatch

if not dispatch.has_triton() or not dispatch.interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime import interpreter


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _kernel(x, out, found, tokens, DTYPE: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """Masks, blocks of unequal shapes, integers, products, sums, scans, functions of this module and of Triton's."""
    row, at = tl.program_id(0), tl.arange(0, SIZE)
    block = tl.load(x + at[:, None] * SIZE + at[None, :], (at < tokens)[:, None], other=1.0)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for i in range(0, tokens, 3):
        total += tl.dot(block, tl.trans(block), input_precision="ieee") * (i + 1) / (row + 2)
    total += tl.exp2(-block).to(DTYPE) * tl.sum(block, 1)[:, None] - tl.max(block, 0)
    total = tl.where((at[:, None] + row) % 2 == 0, _rounded(total, DTYPE), tl.cumsum(total, 1))
    tl.store(out + row * SIZE * SIZE + at[:, None] * SIZE + at[None, :], total, (at < tokens)[None, :])
    count = (at.to(tl.int64) * WIDE + tokens) // 3 ^ row
    tl.store(found + row * SIZE + at, tl.where(at > 2, count, -count))


@triton.jit
def _of_two_shapes(x):
    tl.store(x + tl.arange(0, 16), tl.zeros((16,), tl.float32) + tl.zeros((32,), tl.float32))


def launched(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 16, generator=generator)
    out, found = torch.zeros(2, 16, 16), torch.zeros(2, 16, dtype=torch.int64)
    _kernel[(2,)](x, out, found, 11, dtype, 16, 3_000_000_000)
    with pytest.raises(interpreter.InterpreterError) as caught:
        _of_two_shapes[(1,)](x)
    return out, found, str(caught.value)


@pytest.mark.parametrize("dtype", [tl.float32, tl.float16, tl.bfloat16], ids=str)
def test_numbers_and_errors_are_those_of_triton(dtype):
    quick = launched(dtype)
    with quick_interpreter.without():
        own = launched(dtype)
    again = launched(dtype)
    for out, found, said in (own, again):
        assert torch.equal(out, quick[0]) and torch.equal(found, quick[1]) and said == quick[2]
    assert own[0].isfinite().all() and own[0].abs().max() > 1 and own[1].abs().max() > 2**32


def test_a_launch_leaves_the_language_as_it_was():
    """Outside of launches what is a builtin asks for a compiler."""
    launched(tl.float32)
    with pytest.raises(ValueError, match="_semantic"):
        tl.load(None)


def test_this_triton_has_all_that_is_replaced():
    """Or launches take three times as long, and say nothing: what is named otherwise now is named so there."""
    names = {name for _, name, _, _ in quick_interpreter.replaced}
    assert names == {
        "__call__", "_patch_lang", "_patch_builtin", "options", "_get_np_dtype", "__init__", "broadcast_impl_value",
    }  # fmt: skip
    assert len(quick_interpreter.replaced) == 8
