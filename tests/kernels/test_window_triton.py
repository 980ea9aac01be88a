"""The window's Triton kernels against dense softmax in float64: outputs and gradients, through the maximum too."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.window import NOWHERE, Seen, add_sink, window_chunk, window_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
TOLERANCE = {torch.float32: 1e-4 if ON_GPU else 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
USUAL = (torch.bfloat16, torch.float32) if ON_GPU else (torch.float32, torch.float16)
DIM = 64 if ON_GPU else 16


@dataclass(frozen=True)
class Case:
    """One shape with its options.

    Attributes:
        starts: where documents begin, in new tokens; `front`: padding in front of each row.
        carried: of `prefix`, how many keys in front belong to the first document.
        block: of a terrace, or 0.
    """

    tokens: int
    window: int = 24
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    key_dim: int = DIM
    value_dim: int = DIM
    prefix: int = 0
    carried: int = 0
    starts: tuple[int, ...] = ()
    front: int = 0
    pins: int = 0
    block: int = 0
    softcap: float | None = None
    sink: bool = False
    top: bool = False
    dtypes: tuple[torch.dtype, ...] = USUAL


CASES = {
    "plain": Case(tokens=150),
    "one": Case(tokens=1, dtypes=USUAL[:1]),
    "shorter_than_the_window": Case(tokens=9, window=64, top=True, dtypes=USUAL[:1]),
    "grouped_rows": Case(tokens=70, batch=2, heads=6, kv_heads=2, sink=True, top=True),
    "documents_padding": Case(tokens=130, starts=(20, 21, 70), front=7, sink=True),
    "pinned": Case(tokens=140, window=16, pins=3, top=True),
    "pinned_documents": Case(tokens=150, window=16, pins=5, starts=(12, 14, 60), front=3, batch=2, top=True),
    "prefix": Case(tokens=50, prefix=24, carried=10, top=True),
    "prefix_pinned": Case(tokens=90, prefix=28, carried=28, pins=4, starts=(40,), top=True),
    "terrace": Case(tokens=100, window=32, block=16, starts=(30,), top=True),
    "softcap": Case(tokens=70, softcap=2.0, top=True, sink=True),
    "odd_dims": Case(tokens=40, key_dim=20, value_dim=40, dtypes=USUAL[:1]),
    "window_of_one": Case(tokens=40, window=1, dtypes=USUAL[:1]),
}
if ON_GPU:
    CASES |= {
        "long_pinned": Case(
            tokens=3000, window=64, pins=4, starts=(700, 1500), heads=6, kv_heads=2, top=True
        ),
        "long_pinned_prefix": Case(tokens=2100, window=64, prefix=68, carried=68, pins=4),
        "wide_window": Case(tokens=1200, window=512, heads=4, kv_heads=2, top=True),
        "dim_128_window_256": Case(tokens=600, window=256, key_dim=128, value_dim=128, top=True, sink=True),
        "dim_256_window_512": Case(tokens=1100, window=512, key_dim=256, value_dim=256, top=True, sink=True),
        "dim_256_window_4096": Case(tokens=5000, window=4096, key_dim=256, value_dim=256, pins=20),
        "dim_96_terrace": Case(tokens=700, window=128, block=64, key_dim=96, value_dim=96, heads=4, top=True),
        "dim_32": Case(tokens=300, key_dim=32, value_dim=32, pins=17),
        "batch": Case(tokens=300, batch=5, heads=9, kv_heads=3, window=64, pins=4, starts=(100,)),
    }
RUNS = [
    pytest.param(case, dtype, id=f"{name}-{str(dtype)[6:]}")
    for name, case in CASES.items()
    for dtype in case.dtypes
]


def seen_of(case: Case) -> Seen:
    """What the case's queries see, by plain loops."""
    total = case.prefix + case.tokens
    document = [0] * case.prefix
    number = 0
    for t in range(case.tokens):
        number += t in case.starts
        document.append(number)
    there = [
        case.prefix - case.carried <= j < case.prefix or j >= case.prefix + case.front for j in range(total)
    ]
    first, pin = [], []
    for t in range(case.tokens):
        own = case.prefix + t
        mine = [j for j in range(own + 1) if document[j] == document[own] and there[j]]
        if not there[own]:
            first.append(NOWHERE)
            pin.append(NOWHERE)
            continue
        reach = case.window
        if case.block:
            reach = case.block + (own - mine[0]) % case.block + 1
        first.append(max(own - reach + 1, mine[0]))
        pin.append(mine[0])
    rows = [torch.tensor([x] * case.batch, dtype=torch.int32, device=DEVICE) for x in (first, pin)]
    masked = bool(case.starts or case.front or case.block or case.prefix)
    return Seen(
        case.window, case.prefix, rows[0] if masked else None, rows[1] if case.pins else None, case.pins
    )


def draw(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(case.tokens)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)

    keys = case.prefix + case.tokens
    made = {
        "q": normal(case.batch, case.tokens, case.heads, case.key_dim),
        "k": normal(case.batch, keys, case.kv_heads, case.key_dim),
        "v": normal(case.batch, keys, case.kv_heads, case.value_dim),
    }
    if case.sink:
        made["sink"] = normal(case.heads).float()
    return made


def triton_run(case: Case, given: dict[str, Tensor], seen: Seen) -> list[Tensor]:
    from linearize.kernels.window.operator import window_triton

    with dispatch.kernels("triton"):
        out, log_sum, top = window_triton(
            given["q"], given["k"], given["v"], seen, scaling=case.key_dim**-0.5, softcap=case.softcap,
            sink=given.get("sink"), wants_top=case.top,
        )  # fmt: skip
    return [out, log_sum] if top is None else [out, log_sum, top]


def dense(case: Case, given: dict[str, Tensor], seen: Seen) -> list[Tensor]:
    visible = seen.mask(case.tokens, given["q"].device).expand(case.batch, -1, -1)
    weighted = window_reference(
        given["q"], given["k"], given["v"], visible, scaling=case.key_dim**-0.5, softcap=case.softcap
    )
    if "sink" in given:
        weighted = add_sink(weighted, given["sink"])
    numerator, denominator, top = weighted
    some = denominator > 0
    safe = torch.where(some, denominator, 1.0)
    out = numerator / safe[..., None]
    log_sum = torch.where(some, top + safe.log(), -torch.inf)
    return [out, log_sum, top] if case.top else [out, log_sum]


@pytest.mark.parametrize(("case", "dtype"), RUNS)
def test_outputs_and_gradients(case: Case, dtype: torch.dtype) -> None:
    seen = seen_of(case)
    narrow = draw(case, dtype)
    wide = {name: x.double().requires_grad_() for name, x in narrow.items()}
    narrow = {name: x.requires_grad_() for name, x in narrow.items()}
    expected, found = dense(case, wide, seen), triton_run(case, narrow, seen)
    generator = torch.Generator().manual_seed(1)
    some = expected[1] > -torch.inf
    loss, wanted_loss = torch.zeros((), device=DEVICE), torch.zeros((), device=DEVICE, dtype=torch.float64)
    for wanted, got in zip(expected, found, strict=True):
        assert got.shape == wanted.shape
        keep = some if wanted.dim() == 3 else some[..., None].expand_as(wanted)
        assert torch.isneginf(got).eq(torch.isneginf(wanted)).all()
        close(torch.where(keep, got.double(), 0.0), torch.where(keep, wanted, 0.0), dtype)
        weight = torch.randn(wanted.shape, generator=generator, dtype=torch.float64).to(DEVICE)
        loss = loss + (torch.where(keep, got, 0.0) * weight.to(got.dtype)).sum()
        wanted_loss = wanted_loss + (torch.where(keep, wanted, 0.0) * weight.to(got.dtype).double()).sum()
    wanted_gradients = torch.autograd.grad(wanted_loss, list(wide.values()))
    gradients = torch.autograd.grad(loss, list(narrow.values()))
    for name, wanted, got in zip(narrow, wanted_gradients, gradients, strict=True):
        assert got.isfinite().all(), name
        close(got.double(), wanted, dtype, name)


@pytest.mark.parametrize("name", ["pinned_documents", "prefix_pinned", "pinned"])
def test_pinned_keys_are_summed_over_segments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from linearize.kernels.window import launches, plan

    for module in (launches, plan):
        monkeypatch.setattr(module, "SEGMENT", 64 if ON_GPU else 32)
    test_outputs_and_gradients(CASES[name], torch.float32)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_blocks_of_torch(case: Case) -> None:
    seen, given = seen_of(case), draw(case, torch.float64)
    numerator, denominator, top = window_chunk(
        given["q"], given["k"], given["v"], seen, scaling=case.key_dim**-0.5, softcap=case.softcap
    )
    visible = seen.mask(case.tokens, given["q"].device).expand(case.batch, -1, -1)
    wanted = window_reference(
        given["q"], given["k"], given["v"], visible, scaling=case.key_dim**-0.5, softcap=case.softcap
    )
    for found, expected in zip((numerator, denominator, top), wanted, strict=True):
        torch.testing.assert_close(found, expected)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype, name: str = "") -> None:
    """Relative error of the root mean square; the single worst number at most ten times that."""
    size = wanted.square().mean().sqrt().clamp_min(1e-6)
    error = (found - wanted).square().mean().sqrt() / size
    assert error < TOLERANCE[dtype], f"{name}: {error:.2e}"
