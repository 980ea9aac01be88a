"""Conjugate gradients: against matrices that are solved exactly, in torch and (interpreted) in Triton."""

from __future__ import annotations

import itertools

import kernel_calls
import pytest
import torch

from linearize.kernels import dispatch
from linearize.kernels.conjugate import (
    begun,
    conjugate_chunk,
    conjugate_reference,
    conjugate_solve,
    conjugate_step,
)
from linearize.kernels.dispatch import KernelError
from linearize.kernels.gated_linear.periods import cut

RUNS = dispatch.interpreted() or torch.cuda.is_available()
DEVICE = "cpu" if dispatch.interpreted() or not torch.cuda.is_available() else "cuda"
needs_triton = pytest.mark.skipif(not RUNS, reason="needs TRITON_INTERPRET=1 or a CUDA device")
CASES = {
    "grouped": (2, 6, 3, 16),
    "odd width": (3, 4, 1, 20),
    "one row": (1, 1, 1, 64),
    "many rows": (70, 2, 2, 16),
}
"""B, H, M, F."""


def drawn(case, dtype=torch.float64):
    """Matrices [B, M, F, F], targets [B, H, F] of which one is zero, and ridges [H, F]."""
    batch, heads, held, width = CASES[case]
    generator = torch.Generator().manual_seed(5)
    keys = torch.randn(batch, held, width // 2 + 3, width, generator=generator, dtype=torch.float64)
    target = torch.randn(batch, heads, width, generator=generator, dtype=torch.float64)
    target[0, 0] *= batch > 1
    ridge = 0.25 + torch.rand(heads, width, generator=generator, dtype=torch.float64)
    return (keys.mT @ keys).to(dtype), target.to(dtype), ridge.to(dtype)


def exact(matrix, target, ridge):
    each = matrix.double().repeat_interleave(target.shape[1] // matrix.shape[1], 1)
    return torch.linalg.solve(each + torch.diag_embed(ridge.double()), target.double())


@pytest.mark.parametrize("case", CASES)
def test_as_many_steps_as_columns_solve_it(case):
    given = drawn(case)
    solved = exact(*given)
    torch.testing.assert_close(conjugate_solve(*given, 2 * CASES[case][3]), solved, atol=1e-9, rtol=1e-7)
    many = conjugate_solve(*given, 300)  # what is left is rounding, which leads nowhere
    torch.testing.assert_close(many, solved, atol=1e-9, rtol=1e-7)
    assert torch.equal(conjugate_solve(given[0], 0 * given[1], given[2], 4), 0 * given[1])


def test_each_step_is_nearer():
    """One step leads along the target, as far as least squares allows; no further one leads away."""
    matrix, target, ridge = drawn("many rows")

    def times(x):
        return (x.unsqueeze(2) @ matrix).squeeze(2)

    def whole(x):
        return times(x) + x * ridge

    one = conjugate_reference(times, target, ridge, 1, torch.float64)
    moved = target.square().sum(-1) > 0
    length = (target * target).sum(-1) / (target * whole(target)).sum(-1)
    torch.testing.assert_close(one[moved], (length[..., None] * target)[moved])
    solved = exact(matrix, target, ridge)
    errors = [conjugate_reference(times, target, ridge, n, torch.float64) - solved for n in range(17)]
    energies = [(error * whole(error)).sum(-1)[moved] for error in errors]
    assert all((later < earlier).all() for earlier, later in itertools.pairwise(energies))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_in_triton(case, dtype):
    """Three of them, each from where torch's was; directions and products in the dtype that matrices are read in."""
    matrix, target, ridge = drawn(case, torch.float32)
    batch, heads, held, _ = CASES[case]
    solving = begun(target, dtype)
    for _ in range(3):
        made = (solving.direction.float().unflatten(1, (held, -1)) @ matrix).flatten(1, 2).to(dtype)
        wanted = conjugate_step(solving, made, ridge)
        with dispatch.kernels("triton"):
            there = type(solving)(*(x.to(DEVICE) for x in solving))
            got = conjugate_step(there, made.to(DEVICE), ridge.to(DEVICE))
        assert got.direction.dtype == dtype and got.size.shape == (batch, heads)
        close = 2e-5 if dtype == torch.float32 else 2e-3
        for one, two in zip(got, wanted, strict=True):
            torch.testing.assert_close(one.cpu(), two, atol=close, rtol=close)
        solving = wanted


SOLUTIONS = {f"{case}-{steps}": (case, steps) for case in CASES for steps in (1, 5, 40)}


@needs_triton
@pytest.mark.parametrize(
    ("case", "steps"),
    kernel_calls.cases(SOLUTIONS, {"grouped-40", "one row-40", "many rows-5", "many rows-40"}),
)
def test_a_solution_in_triton(case, steps):
    given = drawn(case, torch.float32)
    wanted = conjugate_solve(*(x.double() for x in given), steps)
    with dispatch.kernels("triton"):
        got = conjugate_solve(*(x.to(DEVICE) for x in given), steps)
    torch.testing.assert_close(got.cpu().double(), wanted, atol=2e-4, rtol=2e-4)


@needs_triton
def test_what_the_kernels_do_not_cover():
    wide = torch.zeros(1, 1, 1, 200, 200), torch.ones(1, 1, 200), torch.ones(1, 200)
    with dispatch.kernels("triton"), pytest.raises(KernelError, match="200 columns, and 128 is the most"):
        conjugate_solve(*(x.to(DEVICE) for x in wide), 2)
    half = begun(torch.ones(1, 1, 16, dtype=torch.float16), torch.float16)
    with dispatch.kernels("triton"), pytest.raises(KernelError, match="solutions are float32"):
        conjugate_step(type(half)(*(x.to(DEVICE) for x in half)), half.x.to(DEVICE), half.x[0].to(DEVICE))


TEXTS = {
    "plain": (1, 70, 2, 2, 16, ""),
    "grouped, decayed": (2, 65, 6, 2, 16, "decay"),
    "documents, from a state": (2, 150, 2, 1, 20, "decay docs before"),
    "documents alone": (1, 130, 2, 2, 16, "docs"),
    "strong decays": (1, 90, 1, 1, 16, "strong"),
    "of one token": (1, 1, 3, 1, 16, "decay before"),
    "of none": (2, 0, 2, 1, 16, "decay"),
}
"""B, T, H, M, F, and what there is."""


def text(case):
    batch, tokens, heads, held, width, what = TEXTS[case]
    generator = torch.Generator().manual_seed(7)

    def random(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    keys = torch.nn.functional.normalize(random(batch, tokens, held, width), dim=-1)
    values = keys * random(batch, tokens, held, 1).sigmoid()
    decay = docs = before = None
    if "decay" in what or "strong" in what:
        decay = -(40.0 if "strong" in what else 0.2) * random(batch, tokens, held).abs()
    if "docs" in what:
        docs = (torch.rand(batch, tokens, generator=generator) < 0.04).cumsum(1)
    if "before" in what:
        some = random(batch, held, width, width)
        before = some @ some.mT / width
    ridge = 0.25 + torch.rand(heads, width, generator=generator, dtype=torch.float64)
    return keys, values, decay, docs, before, random(batch, tokens, heads, width), ridge


def token_by_token(keys, values, decay, docs, before, target, ridge):
    """Each system written down and solved."""
    return solved(keys, values, decay, docs, before, target, ridge)[0]


def solved(keys, values, decay, docs, before, target, ridge):
    """The answers, and the condition numbers [B, T, H] of the systems."""
    batch, tokens, held, width = keys.shape
    out, conditions = torch.zeros_like(target), torch.ones(target.shape[:3], dtype=torch.float64)
    for row in range(batch):
        for head in range(target.shape[2]):
            m, owner = head // (target.shape[2] // held), 0
            matrix = torch.zeros(width, width, dtype=torch.float64) if before is None else before[row, m]
            for t in range(tokens):
                if docs is not None and docs[row, t] != owner:
                    owner, matrix = docs[row, t], torch.zeros_like(matrix)
                kept = 1.0 if decay is None else decay[row, t, m].exp()
                matrix = kept * matrix + torch.outer(keys[row, t, m], values[row, t, m])
                system = matrix + ridge[head].diag()
                out[row, t, head] = torch.linalg.solve(system, target[row, t, head])
                conditions[row, t, head] = torch.linalg.cond(system)
    return out, conditions


@pytest.mark.parametrize("case", TEXTS)
def test_the_systems_of_a_text(case):
    given = text(case)
    torch.testing.assert_close(conjugate_chunk(*given, 45), token_by_token(*given), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
@pytest.mark.parametrize("case", ["plain", "grouped, decayed", "strong decays"])
def test_steps_behind_the_solution_lead_nowhere(case, dtype):
    """Recipes take as many steps as the hardest system needs: what is left of an easy one passes below float16."""
    *given, target, ridge = text(case)
    keys, values = (x.to(dtype) for x in given[:2])
    wanted, conditions = solved(keys.double(), values.double(), *given[2:], target, ridge)
    rest = [None if x is None else x.float() for x in given[2:]]
    rounding = {torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    for steps in (16, 60):
        for size in (1.0, 2.0**20, 2.0**-20):  # of losses that are scaled, too
            got = conjugate_chunk(keys, values, *rest, size * target.float(), ridge.float(), steps)
            off = (got.double() / size - wanted).norm(dim=-1)
            assert (off <= rounding * conditions * wanted.norm(dim=-1)).all(), (steps, size)


@needs_triton
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"]
)
@pytest.mark.parametrize("case", TEXTS)
def test_the_systems_of_a_text_in_triton(case, dtype, poisoned_memory):
    """Against exact solutions of the rounded keys, as near as rounding and the condition of each system let it be."""
    if dtype == torch.bfloat16 and dispatch.interpreted():
        pytest.skip("the interpreter's bfloat16 is not a card's")
    *given, target, ridge = text(case)
    keys, values = (x.to(dtype) for x in given[:2])
    exact = (keys.double(), values.double(), *given[2:], target.to(dtype).double(), ridge)
    wanted, conditions = solved(*exact)
    rest = [None if x is None else (x.float() if x.is_floating_point() else x).to(DEVICE) for x in given[2:]]
    with dispatch.kernels("triton"):
        got = conjugate_chunk(
            keys.to(DEVICE), values.to(DEVICE), *rest, target.to(DEVICE, dtype), ridge.float().to(DEVICE), 25
        )
    assert got.dtype == torch.float32
    rounding = {torch.float32: 2**-22, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    off = (got.cpu().double() - wanted).norm(dim=-1)
    # directions are rounded, and so are their products with the keys
    assert (off <= 2 * rounding * conditions * wanted.norm(dim=-1)).all()


@needs_triton
@pytest.mark.parametrize("carried", [False, True])
def test_a_scan_in_pieces_gives_the_same(carried, monkeypatch):
    """Long texts of few heads are scanned in pieces, whose sums are carried on."""
    from linearize.kernels.conjugate import operator

    keys, values, decay, docs, before, target, ridge = text("documents, from a state")
    given = [keys, values, decay, docs if carried else None, before if carried else None, target, ridge]
    given = [None if x is None else (x.float() if x.is_floating_point() else x).to(DEVICE) for x in given]
    found = []
    for pieces in (1, 3):
        monkeypatch.setattr(operator, "cut", lambda *_, pieces=pieces: cut(150, 1, pieces, lambda: 1))
        with dispatch.kernels("triton"):
            found.append(conjugate_chunk(*given, 6))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@needs_triton
def test_wider_keys_take_one_step_after_the_other():
    keys = torch.nn.functional.normalize(torch.randn(1, 5, 1, 136, device=DEVICE), dim=-1)
    target, ridge = torch.randn(1, 5, 1, 136, device=DEVICE), torch.ones(1, 136, device=DEVICE)
    wanted = conjugate_chunk(
        *(x.double() for x in (keys, keys)), None, None, None, *(x.double() for x in (target, ridge)), 3
    )
    with dispatch.kernels("triton"):
        got = conjugate_chunk(keys, keys, None, None, None, target, ridge, 3)
    torch.testing.assert_close(got.double(), wanted, atol=1e-4, rtol=1e-4)
