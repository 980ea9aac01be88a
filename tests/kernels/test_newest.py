"""A row's last tokens over the newest keys of a ring: against float64 loops, in torch and (interpreted) in Triton."""

from __future__ import annotations

import math

import pytest
import torch

from linearize.kernels import dispatch, sharing
from linearize.kernels.newest import newest_step, newest_steps

RUNS = dispatch.interpreted() or torch.cuda.is_available()
DEVICE = "cpu" if dispatch.interpreted() or not torch.cuda.is_available() else "cuda"
DTYPES = [(torch.float32, 2e-6), (torch.float16, 3e-3)]
if DEVICE == "cuda":
    DTYPES = [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)]
CASES = {
    "grouped": (3, 9, 3, 7, 64, 64),
    "one head each": (2, 4, 4, 150, 16, 16),
    "one key head, odd widths": (4, 5, 1, 65, 24, 40),
    "one slot": (2, 2, 1, 1, 8, 8),
}
"""B, H, N, S, K, V."""


def drawn(case, dtype):
    batch, heads, held, slots, key_dim, value_dim = CASES[case]
    generator = torch.Generator().manual_seed(3)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    newest = torch.randint(slots, (batch,), generator=generator)
    seen = torch.randint(1, slots + 1, (batch,), generator=generator)
    seen[0] = slots
    return (
        normal(batch, heads, key_dim),
        normal(batch, held, slots, key_dim),
        normal(batch, held, slots, value_dim),
        newest,
        seen,
    )


def loops(q, keys, values, newest, seen, scaling, softcap):
    out = torch.zeros(*q.shape[:2], values.shape[-1], dtype=torch.float64)
    group = q.shape[1] // keys.shape[1]
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            scores, found = [], []
            for age in range(int(seen[row])):
                slot = (int(newest[row]) - age) % keys.shape[2]
                score = scaling * float(q[row, head].double() @ keys[row, head // group, slot].double())
                scores.append(score if softcap is None else softcap * math.tanh(score / softcap))
                found.append(values[row, head // group, slot].double())
            weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
            out[row, head] = weights @ torch.stack(found)
    return out


SEVERAL = {
    "five of three heads": (3, 9, 3, 70, 64, 64, 5),
    "two of one head, odd widths": (2, 2, 2, 40, 24, 40, 2),
    "more than a tile of few keys": (2, 4, 1, 30, 16, 16, 9),
    "as many as there are slots": (2, 2, 1, 4, 8, 8, 4),
}
"""B, H, N, S, K, V, T."""


def drawn_of_several(case, dtype):
    """Tokens one behind the other, over the ring's end too; what they see grows by one, and is bounded by a window."""
    *sizes, tokens = SEVERAL[case]
    CASES[case] = tuple(sizes)
    q, keys, values, newest, _ = drawn(case, dtype)
    del CASES[case]
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(*q.shape[:1], tokens, *q.shape[1:], generator=generator, dtype=torch.float64).to(dtype)
    slots, order = sizes[3], torch.arange(tokens)
    seen = torch.randint(1, slots - tokens + 2, (len(q), 1), generator=generator)
    seen[0] = slots - tokens + 1
    seen = seen + order
    seen[1] = seen[1].clamp(max=3)
    return q, keys, values, (newest[:, None] + order) % slots, seen


def loops_of_several(q, keys, values, newest, seen, scaling, softcap):
    each = [
        loops(q[:, at], keys, values, newest[:, at], seen[:, at], scaling, softcap)
        for at in range(q.shape[1])
    ]
    return torch.stack(each, 1)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("case", SEVERAL)
def test_several_tokens_in_torch(case, softcap):
    given = drawn_of_several(case, torch.float64)
    got = newest_steps(*given, scaling=0.3, softcap=softcap)
    torch.testing.assert_close(got, loops_of_several(*given, 0.3, softcap), atol=1e-12, rtol=1e-10)


@pytest.mark.skipif(not RUNS, reason="needs TRITON_INTERPRET=1 or a CUDA device")
@pytest.mark.parametrize("dtype, close", DTYPES)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("case", SEVERAL)
def test_several_tokens_in_triton(case, softcap, dtype, close):
    given = drawn_of_several(case, dtype)
    with dispatch.kernels("triton"):
        got = newest_steps(*(x.to(DEVICE) for x in given), scaling=0.3, softcap=softcap)
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.double().cpu(), loops_of_several(*given, 0.3, softcap), atol=close, rtol=close
    )


@pytest.mark.skipif(not RUNS, reason="needs TRITON_INTERPRET=1 or a CUDA device")
@pytest.mark.parametrize("programs", [2, 64])
def test_programs_that_share_a_key_head_of_several_tokens(programs, monkeypatch):
    """Some of them find keys of the later tokens alone, some none at all."""
    monkeypatch.setitem(SEVERAL, "long", (2, 3, 1, 700, 16, 16, 5))
    monkeypatch.setattr(sharing, "processors", lambda device: programs)
    monkeypatch.setattr(sharing, "WAVES", 2)
    given = drawn_of_several("long", torch.float32)
    given[4][1] = torch.tensor([126, 127, 128, 2, 1])
    with dispatch.kernels("triton"):
        got = newest_steps(*(x.to(DEVICE) for x in given), scaling=0.3, softcap=2.0)
    torch.testing.assert_close(got.double().cpu(), loops_of_several(*given, 0.3, 2.0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_torch(case, softcap):
    given = drawn(case, torch.float64)
    got = newest_step(*given, scaling=0.3, softcap=softcap)
    torch.testing.assert_close(got, loops(*given, 0.3, softcap), atol=1e-12, rtol=1e-10)


@pytest.mark.skipif(not RUNS, reason="needs TRITON_INTERPRET=1 or a CUDA device")
@pytest.mark.parametrize("dtype, close", DTYPES)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_triton(case, softcap, dtype, close):
    given = drawn(case, dtype)
    with dispatch.kernels("triton"):
        got = newest_step(*(x.to(DEVICE) for x in given), scaling=0.3, softcap=softcap)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double().cpu(), loops(*given, 0.3, softcap), atol=close, rtol=close)


def test_what_is_not_seen_is_not_read():
    """Slots of an earlier document may hold anything, NaN too, in the Triton form."""
    if not RUNS:
        pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device")
    q, keys, values, newest, seen = (x.to(DEVICE) for x in drawn("one head each", torch.float32))
    seen[:] = 3
    with dispatch.kernels("triton"):
        one = newest_step(q, keys, values, newest, seen, scaling=0.3)
        for row in range(len(q)):
            old = [(int(newest[row]) - age) % keys.shape[2] for age in range(3, keys.shape[2])]
            keys[row, :, old], values[row, :, old] = torch.nan, torch.nan
        other = newest_step(q, keys, values, newest, seen, scaling=0.3)
    assert torch.equal(one, other)


def test_refusal_names_the_rule():
    q, keys, values, *_ = drawn("one slot", torch.float32)
    pytest.importorskip("triton")
    from linearize.kernels.newest.triton_step import covered

    with pytest.raises(dispatch.KernelError, match="differ"):
        covered(q[:, None].half(), keys, values)
    with pytest.raises(dispatch.KernelError, match="600 tokens of 2 query heads"):
        covered(q[:, None].expand(-1, 600, -1, -1), keys, values)


@pytest.mark.skipif(not RUNS, reason="needs TRITON_INTERPRET=1 or a CUDA device")
@pytest.mark.parametrize("programs", [1, 2, 3, 64])
@pytest.mark.parametrize("case", ["long", "long, odd widths"])
def test_programs_that_share_a_key_head_find_what_one_does(case, programs, monkeypatch):
    """More of them than tiles that are seen, too: those find nothing."""
    step = pytest.importorskip("linearize.kernels.newest.triton_step")
    monkeypatch.setitem(CASES, case, (2, 3, 1, 700, 16, 16) if case == "long" else (2, 5, 1, 450, 24, 40))
    monkeypatch.setattr(sharing, "processors", lambda device: programs)
    monkeypatch.setattr(sharing, "WAVES", 2)
    made, plain = [], step.launch
    monkeypatch.setattr(step, "launch", lambda *given, **named: made.append(named) or plain(*given, **named))
    given = drawn(case, torch.float32)
    given[4][1] = 3
    with dispatch.kernels("triton"):
        got = newest_step(*(x.to(DEVICE) for x in given), scaling=0.3, softcap=2.0)
    tile = sharing.tile_of(16 if case == "long" else 64, 4)
    parts = min(programs, CASES[case][3] // (2 * tile))
    assert made[0]["PARTS"] == parts and len(made) == 1 + (parts > 1)
    torch.testing.assert_close(got.double().cpu(), loops(*given, 0.3, 2.0), atol=1e-5, rtol=1e-5)
