"""Matrices compared row by row, in blocks and in tiles, against both dense matrices in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from kernel_calls import DEVICE, ON_GPU, documents, error, normal, uniform
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from linearize.kernels import dispatch
from linearize.kernels.mixing_matrix import (
    KINDS,
    SMALLEST,
    Kind,
    Products,
    Softmax,
    chunk,
    mixing_matrix_reference,
    mixing_matrix_rows,
)

USUAL = (torch.bfloat16, torch.float32) if ON_GPU else (torch.float32,)
TOLERANCE = {torch.float32: 1e-4 if ON_GPU else 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """One shape with its options; `starts` of documents and `front` padding are of the second row alone."""

    tokens: int
    heads: int = 2
    kv_heads: int = 1
    map_heads: int = 2
    key_dim: int = 8
    features: int = 16
    decay: bool = False
    normalized: bool = True
    signed: bool = False
    starts: tuple[int, ...] = ()
    front: int = 0
    gaps: tuple[int, ...] = ()
    window: int | None = None
    softcap: float | None = None
    sink: bool = False
    sharp: float = 1.0
    dtypes: tuple[torch.dtype, ...] = USUAL


CASES = {
    "one": Case(tokens=1),
    "grouped": Case(tokens=40, heads=4, kv_heads=2, map_heads=1),
    "decay": Case(tokens=41, decay=True, normalized=False, signed=True, map_heads=1),
    "decay_packed": Case(tokens=45, decay=True, starts=(10, 11, 35)),
    "packed_padded": Case(tokens=45, starts=(20, 33, 34), front=5, gaps=(25, 26, 44)),
    "teachers_window_cap_sink": Case(tokens=40, window=17, softcap=2.0, sink=True, map_heads=2),
    "clamped": Case(tokens=40, sharp=14.0),
    "sixteen_bits": Case(tokens=70, starts=(33,), dtypes=(torch.float16,)),
}
if ON_GPU:
    CASES |= {
        "hedgehog": Case(
            tokens=1000, heads=9, kv_heads=3, map_heads=9, key_dim=64, features=128, starts=(300, 811)
        ),
        "mohawk": Case(
            tokens=520,
            heads=9,
            kv_heads=3,
            map_heads=3,
            key_dim=64,
            features=64,
            decay=True,
            normalized=False,
            signed=True,
        ),
        "wide": Case(tokens=300, heads=4, map_heads=4, key_dim=256, features=256),
        "odd": Case(tokens=200, key_dim=80, features=100, starts=(7,)),
    }
RUNS = [
    pytest.param(case, kind, dtype, id=f"{name}-{kind}-{str(dtype)[6:]}")
    for name, case in CASES.items()
    for kind in KINDS
    for dtype in case.dtypes
    if kind == "squares" or not case.signed  # a logarithm of signed weights is nothing's objective
]


def made(case: Case) -> tuple[Softmax, Products, Tensor | None]:
    """Both sides in float64, and the codes of two rows."""
    size = (2, case.tokens)
    q, k = normal(*size, case.heads, case.key_dim), normal(*size, case.kv_heads, case.key_dim, seed=1)
    sink = normal(case.heads, seed=2) if case.sink else None
    a = (case.sharp * normal(*size, case.heads, case.features, seed=3)).softmax(-1)
    b = (case.sharp * normal(*size, case.map_heads, case.features, seed=4)).softmax(-1)
    if case.signed:
        a, b = a - 0.1, b - 0.05
    total = -uniform(*size, case.map_heads, seed=5).cumsum(1) if case.decay else None
    codes = None
    if case.starts or case.front or case.gaps:
        codes = documents(2, case.tokens, (), case.starts).cpu()
        codes[1, : case.front] = -1
        places = list(case.gaps)
        codes[1, places] = -1 - codes[1, places]
    teacher = Softmax(q, k, case.key_dim**-0.5, case.softcap, case.window, sink)
    return teacher, Products(a, b, total, case.normalized), codes


def run(form, kind: Kind, case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Rows, and the gradients of features and totals under a slope of every row."""
    teacher, student, codes = made(case)

    def to(x: Tensor | None, dtype: torch.dtype = dtype) -> Tensor | None:
        return None if x is None else x.to(device, dtype)

    teacher = replace(teacher, q=to(teacher.q), k=to(teacher.k), sink=to(teacher.sink))
    student = replace(student, q=to(student.q), k=to(student.k), total=to(student.total, torch.float64))
    leaves = [x for x in (student.q, student.k, student.total) if x is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    rows = form(kind, teacher, student, None if codes is None else codes.to(device))
    slope = uniform(*rows.shape, seed=6).to(rows)
    (rows * slope).sum().backward()
    return [rows.detach(), *(leaf.grad for leaf in leaves)]


def exact(kind: Kind, case: Case, dtype: torch.dtype) -> list[Tensor]:
    """The definition on numbers as the narrow dtype holds them."""

    def reference(kind, teacher, student, codes):
        return mixing_matrix_reference(kind, teacher, student, codes)

    def rounded(kind, teacher, student, codes):
        def narrow(x: Tensor | None) -> Tensor | None:
            return None if x is None else x + (x.detach().to(dtype).to(x.dtype) - x.detach())

        teacher = replace(teacher, q=narrow(teacher.q), k=narrow(teacher.k), sink=narrow(teacher.sink))
        return reference(kind, teacher, replace(student, q=narrow(student.q), k=narrow(student.k)), codes)

    return run(rounded, kind, case, torch.float64, "cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_blocks_are_the_definition(name: str, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "BLOCK_ELEMENTS", 1)
    case = replace(CASES[name], tokens=min(CASES[name].tokens, 101))
    if case.signed and kind != "squares":
        return
    ours = run(mixing_matrix_rows, kind, case, torch.float64, "cpu")
    for got, wanted in zip(ours, run(mixing_matrix_reference, kind, case, torch.float64, "cpu"), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("case", "kind", "dtype"), RUNS)
def test_tiles_are_the_definition(case: Case, kind: Kind, dtype: torch.dtype) -> None:
    with dispatch.kernels("triton"):
        ours = run(mixing_matrix_rows, kind, case, dtype, DEVICE)
    for got, wanted in zip(ours, exact(kind, case, dtype), strict=True):
        # where a text of one token has no gradient, a rounding of its weight, which is one, is none either
        assert error(got.cpu(), wanted, least=1e-2) < TOLERANCE[dtype]


def test_the_cases_clamp() -> None:
    """Else "clamped" would say nothing of weights below the smallest."""
    _, student, _ = made(CASES["clamped"])
    weights = torch.einsum("bthf,bshf->bhts", student.q, student.k).tril()
    shares = weights / weights.sum(-1, keepdim=True)
    below = (shares < SMALLEST).float().tril().sum() / shares.tril().count_nonzero()
    assert 0.02 < below < 0.9


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that anything makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return made


def test_no_matrix_is_made_or_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forward nor backward has anything that grows with the square of the text."""
    monkeypatch.setattr(chunk, "BLOCK_ELEMENTS", 1)

    def largest(tokens: int) -> int:
        teacher, student, _ = made(Case(tokens=tokens, heads=4, map_heads=4, decay=True))
        student = replace(student, q=student.q.requires_grad_(), k=student.k.requires_grad_())
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with Largest() as seen:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                rows = mixing_matrix_rows("cross_entropy", teacher, student, None)
            rows.sum().backward()
        assert sum(kept.values()) <= 2 * sum(x.nbytes for x in (student.q, student.k, student.total))
        return seen.bytes

    short, long = largest(256), largest(1024)
    assert long <= 4.1 * short and long < 2 * 4 * 1024 * 1024 * 8 / 16
