"""distill in Triton and in torch, against whole logits in float64: loss, every gradient, and what memory it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from linearize.kernels import dispatch
from linearize.kernels.distill import (
    Head,
    distill_loss,
    distill_reference,
    operator,
    slice_tokens,
    target_log_probs,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = [
    ("torch", torch.float64),
    ("torch", torch.float32),
    ("triton", torch.float32),
    ("triton", torch.float16),
    ("torch", torch.bfloat16),
]
if DEVICE == "cuda":
    FORMS += [("triton", torch.bfloat16)]
forms = pytest.mark.parametrize(("form", "dtype"), FORMS, ids=[f"{f}-{str(d)[6:]}" for f, d in FORMS])
# the logits and their gradient are rounded to the narrow dtypes between the two matrix products
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DIM, TEACHER_DIM = 16, 24


@pytest.fixture(autouse=True)
def interpreter() -> None:
    if DEVICE == "cpu" and not dispatch.interpreted():
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")


@dataclass(frozen=True)
class Case:
    """A call; `scale` and `softcap` of the student, the teacher has others of its own."""

    tokens: int = 21
    vocabulary: int = 301
    at_once: int = 8
    next_token: float = 0.7
    divergence: float = 1.3
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None
    teacher_softcap: float | None = None


CASES = {
    "both losses": Case(),
    "next token": Case(divergence=0.0),
    "divergence": Case(next_token=0.0),
    "bias": Case(bias=True),
    "scale and caps": Case(scale=0.5, softcap=3.0, teacher_softcap=2.0),
    "next token, capped": Case(divergence=0.0, softcap=2.0),
    "capped teacher": Case(teacher_softcap=1.5),
    "one token a slice": Case(tokens=3, at_once=1),
    "one slice": Case(tokens=5, at_once=64),
    "one token": Case(tokens=1),
    "aligned vocabulary": Case(vocabulary=512, tokens=4),
    "several blocks": Case(vocabulary=4099, tokens=3, bias=True),
    "two words": Case(vocabulary=2),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def normal(*size: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Numbers that `dtype` holds, in float64: rounding of the inputs is no error of the kernel."""
    drawn = torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(dtype).double()


def draw(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(9)
    weights = torch.rand(case.tokens, generator=generator) - 0.2
    weights[::4] = 0.0
    weights[-1] = 0.5
    return {
        "hidden": normal(case.tokens, DIM, seed=1, dtype=dtype),
        "weight": normal(case.vocabulary, DIM, seed=2, dtype=dtype),
        "bias": normal(case.vocabulary, seed=3, dtype=dtype) if case.bias else None,
        "teacher": normal(case.tokens, TEACHER_DIM, seed=4, dtype=dtype),
        "teacher_weight": normal(case.vocabulary, TEACHER_DIM, seed=5, dtype=dtype),
        "teacher_bias": normal(case.vocabulary, seed=6, dtype=dtype) if case.bias else None,
        "targets": torch.randint(0, case.vocabulary, (case.tokens,), generator=generator).masked_fill(
            weights == 0, -100
        ),
        "weights": weights,
    }


def place(tensors: dict[str, Any], dtype: torch.dtype, grad: bool = True) -> dict[str, Any]:
    """On the device, as leaves; targets and weights keep their own dtype."""
    found = {}
    for name, x in tensors.items():
        if x is None or name in ("targets", "weights"):
            found[name] = None if x is None else x.to(DEVICE)
        else:
            found[name] = x.detach().to(DEVICE, dtype).requires_grad_(grad and not name.startswith("teacher"))
    return found


def arguments(case: Case, tensors: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    theirs = Head(tensors["teacher_weight"], tensors["teacher_bias"], 0.75, case.teacher_softcap)
    head = Head(tensors["weight"], tensors["bias"], case.scale, case.softcap)
    options = {
        "next_token": case.next_token,
        "divergence": case.divergence,
        "teacher": (tensors["teacher"], theirs) if case.divergence else None,
    }
    return (tensors["hidden"], head, tensors["targets"], tensors["weights"]), options


def leaves(tensors: dict[str, Any]) -> list[Tensor]:
    return [x for x in tensors.values() if x is not None and x.requires_grad]


def expected(case: Case, tensors: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
    with torch.device("cpu"):
        wide = {
            name: None if x is None else x.detach().cpu().requires_grad_(name in ("hidden", "weight", "bias"))
            for name, x in tensors.items()
        }
    given, options = arguments(case, wide)
    loss = distill_reference(*given, **options)
    return loss.detach(), torch.autograd.grad(loss, leaves(wide))


def close(actual: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert actual.shape == wanted.shape
    actual = actual.detach().double().cpu()
    assert actual.isfinite().all()
    assert (actual - wanted).norm() <= tolerance * wanted.norm() + 1e-12


@cases
@forms
def test_loss_and_gradients(case: Case, form: str, dtype: torch.dtype) -> None:
    tensors = draw(case, dtype)
    wanted, gradients = expected(case, tensors)
    ours = place(tensors, dtype)
    given, options = arguments(case, ours)
    with dispatch.kernels(form):
        loss = distill_loss(*given, **options, at_once=case.at_once)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    close(loss, wanted, TOLERANCE[dtype])
    (3.0 * loss).backward()
    for leaf, gradient in zip(leaves(ours), gradients, strict=True):
        assert leaf.grad.dtype == dtype
        close(leaf.grad, 3.0 * gradient, TOLERANCE[dtype])


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(form: str, trained: str) -> None:
    case = Case(bias=True)
    tensors = draw(case, torch.float32)
    ours = place(tensors, torch.float32, grad=False)
    ours[trained].requires_grad_()
    given, options = arguments(case, ours)
    with dispatch.kernels(form):
        distill_loss(*given, **options, at_once=8).backward()
    names = ["hidden", "weight", "bias"]
    close(ours[trained].grad, expected(case, tensors)[1][names.index(trained)], 2e-5)
    assert all(ours[name].grad is None for name in names if name != trained)


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_a_teacher_that_is_the_student_costs_nothing(form: str) -> None:
    ours = place(draw(Case(), torch.float32), torch.float32)
    head = Head(ours["weight"])
    with dispatch.kernels(form):
        loss = distill_loss(
            ours["hidden"],
            head,
            ours["targets"],
            ours["weights"],
            divergence=1.0,
            teacher=(ours["hidden"], head),
        )
    loss.backward()
    assert loss.abs() < 1e-5 and ours["hidden"].grad.abs().max() < 1e-5 and ours["teacher"].grad is None


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_extreme_logits(form: str) -> None:
    """Far beyond what an exponential holds, and one word that takes all."""
    hidden = torch.eye(2, 4, device=DEVICE).requires_grad_()
    weight = torch.zeros(300, 4, device=DEVICE)
    weight[:, 0] = -3e4
    weight[7, 0] = 3e4
    weight[:, 1] = torch.linspace(-2e4, 2e4, 300)
    targets = torch.tensor([7, 299], device=DEVICE)
    head = Head(weight)
    flat = Head(torch.zeros(300, 4, device=DEVICE))
    with dispatch.kernels(form):
        loss = distill_loss(
            hidden,
            head,
            targets,
            torch.ones(2, device=DEVICE),
            next_token=1.0,
            divergence=1e-6,
            teacher=(hidden, flat),
        )
    wanted = distill_reference(
        hidden.double(), Head(weight.double()), targets, torch.ones(2, device=DEVICE),
        next_token=1.0, divergence=1e-6, teacher=(hidden.double(), Head(flat.weight.double())),
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(wanted, hidden)
    loss.backward()
    close(loss, wanted.detach().cpu(), 1e-5)
    close(hidden.grad, gradient.double().cpu(), 1e-5)


@forms
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_log_probabilities(softcap: float | None, form: str, dtype: torch.dtype) -> None:
    case = Case(softcap=softcap, bias=True, divergence=0.0, next_token=-1.0, scale=0.5)
    tensors = draw(case, dtype)
    ours = place(tensors, dtype)
    given, _ = arguments(case, ours)
    seen = ours["weights"] != 0
    with dispatch.kernels(form):
        found = target_log_probs(*given[:3], seen, at_once=8)
    assert not found.requires_grad and (found[~seen] == 0).all()
    for index in range(case.tokens):
        one = torch.zeros(case.tokens, dtype=torch.float64)
        one[index] = float(seen[index])
        wanted, _ = expected(case, {**tensors, "weights": one})
        assert abs(found[index].item() - wanted.item()) <= TOLERANCE[dtype] * max(1.0, abs(wanted.item()))


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_tokens_without_loss_may_hold_anything(form: str) -> None:
    tensors = draw(Case(), torch.float32)
    ours, spoiled = place(tensors, torch.float32), place(tensors, torch.float32)
    unseen = ours["weights"] == 0
    spoiled["hidden"] = torch.where(unseen[:, None], float("nan"), ours["hidden"]).detach().requires_grad_()
    losses = []
    with dispatch.kernels(form):
        for x in (ours, spoiled):
            given, options = arguments(Case(), x)
            losses.append(distill_loss(*given, **options, at_once=8))
            losses[-1].backward()
    assert torch.equal(*losses) and torch.equal(ours["hidden"].grad, spoiled["hidden"].grad)
    assert (ours["hidden"].grad[unseen] == 0).all()


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_a_token_that_is_not_finite_shows_in_the_loss(form: str) -> None:
    ours = place(draw(Case(), torch.float32), torch.float32)
    with torch.no_grad():
        ours["hidden"][-1, 0] = float("nan")
    given, options = arguments(Case(), ours)
    with dispatch.kernels(form):
        assert distill_loss(*given, **options).isnan()


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_wide_parameters_beside_a_narrow_computation(form: str) -> None:
    """A head that trains is float32 and computes in the model's dtype; its gradient adds up in float32."""
    case = Case(bias=True)
    tensors = draw(case, torch.float16)
    wanted, gradients = expected(case, tensors)
    ours = place(tensors, torch.float32)
    given, options = arguments(case, ours)
    with dispatch.kernels(form):
        loss = distill_loss(*given, **options, at_once=8, dtype=torch.float16)
    loss.backward()
    close(loss, wanted, 4e-3)
    for leaf, gradient in zip(leaves(ours), gradients, strict=True):
        assert leaf.grad.dtype == torch.float32
        close(leaf.grad, gradient, 4e-3)


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_no_tokens(form: str) -> None:
    case = Case(tokens=1)
    ours = place(draw(case, torch.float32), torch.float32)
    for name in ("hidden", "teacher", "targets", "weights"):
        ours[name] = ours[name].detach()[:0].requires_grad_(name == "hidden")
    given, options = arguments(case, ours)
    with dispatch.kernels(form):
        loss = distill_loss(*given, **options)
    loss.backward()
    assert loss == 0 and (ours["weight"].grad == 0).all()


def test_rows_of_hidden_states_may_lie_apart() -> None:
    case = Case()
    tensors = draw(case, torch.float32)
    ours = place(tensors, torch.float32)
    wide = torch.cat([ours["hidden"], ours["hidden"]], 1).detach()
    given, options = arguments(case, {**ours, "hidden": wide[:, :DIM]})
    with dispatch.kernels("triton"):
        loss = distill_loss(*given, **options)
    close(loss, expected(case, tensors)[0], 2e-5)


@pytest.mark.parametrize("vocabulary", [97, 128, 300])
def test_nothing_is_read_that_nobody_wrote(vocabulary: int) -> None:
    """oneDNN's bfloat16 products take what lies behind an odd row times 0; a run in a few ended in NaN."""
    hidden = normal(40, 32, seed=1, dtype=torch.bfloat16).bfloat16().requires_grad_()
    head = Head(normal(vocabulary, 32, seed=2, dtype=torch.bfloat16).bfloat16().requires_grad_())
    targets, weights = torch.arange(40) % vocabulary, torch.full((40,), 0.025)
    for at_once in (40, 32):
        with dispatch.kernels("torch"):
            loss = distill_loss(hidden, head, targets, weights, next_token=1.0, at_once=at_once)
        assert all(x.isfinite().all() for x in torch.autograd.grad(loss, [hidden, head.weight]))


def test_same_numbers_twice() -> None:
    def once() -> list[Tensor]:
        ours = place(draw(Case(), torch.float32), torch.float32)
        given, options = arguments(Case(), ours)
        with dispatch.kernels("triton"):
            loss = distill_loss(*given, **options, at_once=8)
        loss.backward()
        return [loss.detach(), *(x.grad for x in leaves(ours))]

    assert all(torch.equal(x, y) for x, y in zip(once(), once(), strict=True))


class Largest(TorchDispatchMode):
    """Bytes of the largest memory that an operation gives, inside the operator too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.linearize.distill.default:
            with self:  # its own tensors are what this is about
                return operator.distill._init_fn(*args, **(kwargs or {}))
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("grad", [False, True], ids=["frozen head", "trained head"])
def test_no_tensor_of_all_logits(grad: bool, form: str) -> None:
    case = Case(tokens=64, vocabulary=256)
    ours = place(draw(case, torch.float32), torch.float32, grad)
    ours["hidden"].requires_grad_()
    given, options = arguments(case, ours)
    most = []
    for at_once in (4, 64):
        with Largest() as largest, dispatch.kernels(form):
            distill_loss(*given, **options, at_once=at_once).backward()
        most.append(largest.bytes)
    # the head's own matrix is as large as anything may be
    assert 4 * 4 * case.vocabulary <= most[0] <= 4 * case.vocabulary * TEACHER_DIM
    assert most[1] == 4 * case.tokens * case.vocabulary, "the test would not see them"


def test_slices_of_any_vocabulary() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for vocabulary in (2, 49_152, 128_256, 256_000):
        assert slice_tokens(vocabulary, cpu) * vocabulary <= 2**24 or slice_tokens(vocabulary, cpu) == 1
        assert slice_tokens(vocabulary, cuda) % 256 == 0
        assert slice_tokens(vocabulary, cuda) * vocabulary <= max(2**26, 256 * vocabulary)


def test_operator_is_well_formed() -> None:
    ours = place(draw(Case(tokens=5, vocabulary=20, bias=True), torch.float32), torch.float32)
    given = [ours[name] for name in ("hidden", "weight", "bias", "teacher", "teacher_weight", "teacher_bias")]
    rest = [
        ours["targets"],
        ours["weights"],
        [0.7, 1.3, 0.5, 3.0, 1.0, 0.0],
        [True, False, True],
        torch.float32,
        4,
    ]
    torch.library.opcheck(
        operator.distill,
        (*given, *rest),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
