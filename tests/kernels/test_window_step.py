"""One token against a window's ring: the Triton form, short and long rings, against the torch form in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from linearize.kernels import dispatch, sharing
from linearize.kernels.window.recurrent import Held, window_step

RUNS = dispatch.interpreted() or torch.cuda.is_available()
DEVICE = "cpu" if dispatch.interpreted() or not torch.cuda.is_available() else "cuda"
pytestmark = pytest.mark.skipif(not RUNS, reason="needs TRITON_INTERPRET=1 or a CUDA device")
DTYPES = [(torch.float32, 1e-5)] + [(torch.bfloat16, 2e-2)] * (DEVICE == "cuda")


@dataclass(frozen=True)
class Case:
    batch: int = 2
    heads: int = 6
    kv_heads: int = 2
    key_dim: int = 16
    value_dim: int = 16
    span: int = 90
    first: int = 0
    sees: int | None = None
    """Fewer tokens than the ring has."""
    softcap: float | None = None
    sink: bool = False
    reach: bool = False
    turned: bool = False
    full: float = 0.9
    """Of the slots, those that hold a key."""
    padding: bool = True


CASES = {
    "short": Case(span=32),
    "short, no power of two": Case(span=37, heads=4, kv_heads=4, key_dim=24, value_dim=40),
    "short, pinned": Case(span=16, first=4, turned=True, sink=True),
    "short, reach": Case(span=20, reach=True),
    "long": Case(),
    "long, teacher's window": Case(sees=50, softcap=3.0),
    "long, reach": Case(reach=True, sink=True),
    "long, pinned": Case(first=4, turned=True),
    "long, pinned, no turn": Case(first=3, sink=True, padding=False),
    "long, one key head, odd widths": Case(heads=5, kv_heads=1, key_dim=24, value_dim=40, span=77),
    "long, one key": Case(full=0.0),
}


def drawn(case: Case, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(5)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    batch, slots = case.batch, case.first + case.span + 1
    valid = torch.rand(batch, slots, generator=generator) < case.full
    valid[:, : case.first] = True
    if case.first and not case.turned:
        valid[0, case.first - 1 :] = False  # a text that has fewer tokens than are pinned, too short to turn
    places = torch.randint(4 * case.span, (batch, 1), generator=generator)
    # the slot of the token that comes is read by none
    valid.scatter_(1, case.first + places % (case.span + 1), False)
    held = [normal(batch, slots, case.kv_heads, width) for width in (case.key_dim, case.value_dim)]
    held += [valid, places.expand(-1, case.heads).contiguous()]
    tokens = []
    for _ in range(3):
        q, turned = (normal(batch, 1, case.heads, case.key_dim) for _ in range(2))
        k, v = (normal(batch, 1, case.kv_heads, width) for width in (case.key_dim, case.value_dim))
        seen = torch.randint(1, case.span + 1, (batch, 1), generator=generator)
        here = torch.ones(batch, 1, dtype=torch.bool)
        here[1] = not case.padding
        tokens.append((q, k, v, here, seen if case.reach else None, turned if case.turned else None))
    return held, tokens, normal(case.heads) if case.sink else None


def run(case: Case, drawn, form):
    """Outputs and log of the sums after each token, and the state at the end."""
    held, tokens, sink = drawn
    held, made = Held(*held, case.first), []
    for q, k, v, valid, reach, turned in tokens:
        span = case.sees or case.span
        options = {"valid": valid, "span": span, "reach": reach, "sink": sink, "turned": turned}
        made.append(form(q, k, v, held, scaling=0.4, softcap=case.softcap, **options))
    return made, (held.k, held.v, held.valid, held.next)


def moved(x, move):
    if isinstance(x, torch.Tensor):
        return move(x)
    return type(x)(moved(y, move) for y in x) if isinstance(x, list | tuple) else x


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Rings of few keys are long already."""
    from linearize.kernels.window import triton_step

    monkeypatch.setattr(triton_step, "SHORT", 40)
    monkeypatch.setattr(sharing, "TILE", 1024)
    monkeypatch.setattr(sharing, "WAVES", 1)


@pytest.mark.parametrize("dtype, close", DTYPES)
@pytest.mark.parametrize(
    "name, programs", [(name, 12) for name in CASES] + [("long", 1), ("long", 400), ("long, reach", 400)]
)
def test_equals_the_torch_form(name, programs, dtype, close, monkeypatch):
    from linearize.kernels.window import triton_step

    case = CASES[name]
    is_long = name.startswith("long")
    monkeypatch.setattr(sharing, "processors", lambda device: programs)
    shared, launch = [], triton_step.launch
    monkeypatch.setattr(
        triton_step, "launch", lambda kernel, grid, **x: shared.append((grid, x)) or launch(kernel, grid, **x)
    )
    given = drawn(case, dtype)
    wide = moved(given, lambda x: x.double() if x.is_floating_point() else x.clone())
    expected, after = run(case, wide, window_step)
    with dispatch.kernels("triton"):
        got, state = run(case, moved(given, lambda x: x.to(DEVICE).clone()), triton_step.window_step_triton)
    assert len(shared) == 3 * (1 + is_long + (case.first > 0))
    if is_long:
        most = min(64, programs // (case.batch * case.kv_heads), (case.span + 1) // (2 * shared[0][1]["W"]))
        assert shared[0][0] == (case.batch * case.kv_heads, max(1, most))
    for (out, log_sum, _), (numerator, denominator, top), token in zip(got, expected, given[1], strict=True):
        # nobody reads what padding is told
        here = token[3][:, 0]
        out, log_sum = out.cpu()[here], log_sum.cpu()[here]
        numerator, denominator, top = numerator[here], denominator[here], top[here]
        some = denominator > 0
        answer = torch.where(some[..., None], numerator / denominator.clamp_min(1e-300)[..., None], 0.0)
        torch.testing.assert_close(out.double(), answer, atol=close, rtol=close)
        logs = torch.where(some, top + denominator.log(), -torch.inf)
        torch.testing.assert_close(log_sum.double(), logs, atol=close, rtol=close)
    keys = after[2][..., None, None]
    for one, other in zip(state, after, strict=True):
        if one.is_floating_point():  # slots without a key may hold anything
            one, other = one.cpu().where(keys, 0.0), other.to(dtype).where(keys, 0.0)
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("span", [20, 90])
def test_what_is_not_seen_is_not_read(span):
    """Slots without a key may hold anything, NaN too."""
    from linearize.kernels.window.triton_step import window_step_triton

    case = Case(span=span, full=0.5)
    (k, v, valid, places), tokens, _ = moved(drawn(case, torch.float32), lambda x: x.to(DEVICE))
    made = []
    for hidden in (0.0, torch.nan):
        filled = [x.masked_fill(~valid[..., None, None], hidden) for x in (k, v)]
        held = [*filled, valid.clone(), places.clone()]
        with dispatch.kernels("triton"):
            made.append(run(case, (held, tokens, None), window_step_triton)[0])
    for one, other in zip(*made, strict=True):
        assert torch.equal(one[0], other[0]) and not one[0].isnan().any()
