"""gated_linear in Triton against the loop over tokens in float64: outputs, states, every gradient, every decay."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.gated_linear import gated_linear_reference
from linearize.kernels.gated_linear.operator import gated_linear_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
if DEVICE == "cuda":
    TOLERANCE[torch.float32] = 1e-4
NARROW = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
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
    tokens: int = 100
    heads: int = 2
    state_heads: int = 2
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


CASES = {"plain": Case(), "plain-sums_only": Case(normalize=False, documents=True, state=True, tokens=140)}
for name, case in {
    "mild": Case(),
    "one": Case(tokens=1, batch=2),
    "short": Case(tokens=7, state=True),
    "strong": Case(strength="strong"),
    "mixed": Case(strength="mixed", tokens=140),
    "huge": Case(strength="huge", documents=True),
    "sums_only": Case(strength="weak", normalize=False, state=True),
    "grouped": Case(strength="weak", heads=4, documents=True, state=True),
    "documents": Case(
        tokens=200, strength="weak", batch=2, heads=1, state_heads=1, documents=True, state=True
    ),
    "before": Case(strength="mixed", read_before=True, documents=True, state=True),
    "bonus": Case(strength="mild", bonus=True, heads=2, state_heads=1),
    "segments": Case(tokens=400, heads=1, state_heads=1, strength="weak", segments=3, state=True),
    "segments_documents": Case(
        tokens=530,
        heads=2,
        state_heads=1,
        strength="weak",
        segments=4,
        state=True,
        documents=True,
        normalize=False,
    ),
    "odd_widths": Case(features=20, values=24, tokens=70, heads=1, state_heads=1, state=True),
    "wide": Case(features=64, values=32, heads=1, state_heads=1, strength="weak"),
}.items():
    CASES |= {f"{over}-{name}": one for over, one in both(case).items()}
CASES["plain-segments"] = replace(CASES["head-segments_documents"], over=None)
CASES["plain-blocks"] = Case(tokens=70, features=256, values=128, heads=1, state_heads=1)
CASES["head-blocks"] = Case(over="head", tokens=70, features=256, values=128, heads=1, state_heads=1)
CASES["key-blocks"] = Case(over="key", tokens=70, features=128, values=64, heads=1, state_heads=1)
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
    starts = torch.zeros(case.batch, case.tokens, dtype=torch.int64)
    for row, places in enumerate([(5, 6, 40, 64, 100, 128, 270), (0, 3, 70, 130)][: case.batch]):
        starts[row, [place for place in places if place < case.tokens]] = 1
    return starts.cumsum(1).to(DEVICE)


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


def error(ours: Tensor, exact: Tensor) -> float:
    ours, exact = ours.double(), exact.double()
    return ((ours - exact).norm() / exact.norm().clamp_min(1e-1 * max(1, exact.numel()) ** 0.5)).item()


@cases
@pytest.mark.parametrize("dtype", NARROW, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_equals_the_definition(case, dtype):
    exact, exact_grads = run(case, torch.float64, "reference")
    found, grads = run(case, dtype, "triton")
    assert found["numerator"].dtype == dtype
    assert all(found[name].dtype == torch.float32 for name in found if name != "numerator")
    errors = {name: error(found[name], exact[name]) for name in exact}
    errors |= {f"d{name}": error(grads[name], exact_grads[name]) / 3 for name in grads}
    assert max(errors.values()) < TOLERANCE[dtype], errors
