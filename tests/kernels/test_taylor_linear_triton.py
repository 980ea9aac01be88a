"""taylor_linear against the loop over tokens in float64: outputs, states, every gradient, and the one-token form."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import cache

import kernel_calls
import pytest
import torch
from kernel_calls import DEVICE, NARROW, TOLERANCE, normal
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.taylor_linear import (
    taylor_features,
    taylor_linear_chunk,
    taylor_linear_reference,
    taylor_linear_step,
)
from linearize.kernels.taylor_linear.operator import taylor_linear_triton
from linearize.kernels.taylor_linear.plan import features

error = functools.partial(kernel_calls.error, least=1e-1)


@dataclass(frozen=True)
class Case:
    """One shape with its options."""

    tokens: int = 70
    heads: int = 1
    state_heads: int = 1
    value_heads: int = 1
    dim: int = 16
    values: int = 16
    normalize: bool = True
    documents: bool = False
    padding: bool = False
    state: bool = False
    segments: int = 0
    batch: int = 1

    @property
    def scale(self) -> float:
        return self.dim**-0.5


CASES = {
    "plain": Case(),
    "one": Case(tokens=1, batch=2, state=True),
    "narrow": Case(tokens=66, dim=8, state=True, padding=True),
    "wide": Case(tokens=33, dim=32, state=True),
    "grouped": Case(heads=4, state_heads=2, value_heads=2, documents=True, padding=True, state=True),
    "shared values": Case(heads=2, state_heads=2, padding=True, tokens=66),
    "periods": Case(tokens=270, dim=8, state=True),
    "padding": Case(tokens=66, padding=True, batch=2),
    "documents": Case(tokens=140, documents=True, padding=True, state=True, batch=2),
    "sums only": Case(tokens=70, documents=True, state=True, normalize=False),
    "segments": Case(tokens=530, dim=8, segments=2, state=True, documents=True, padding=True),
    "blocks": Case(values=128, state=True, tokens=33),
    "odd values": Case(values=24, state=True, tokens=33),
}
TWICE = {"plain", "grouped", "wide"}
"""float16 takes the same way through the kernels but for its roundings, and the interpreter is slow."""
PAIRS = {
    f"{name}-{str(dtype).removeprefix('torch.')}": (case, dtype)
    for name, case in CASES.items()
    for dtype in (NARROW if DEVICE == "cuda" or name in TWICE else NARROW[:1])
}
RARELY = {"plain", "documents", "padding"}


def draw(case: Case) -> dict[str, Tensor]:
    """Random float64 inputs of a call; what stands on padding is as large as the rest, and must not be seen."""
    rows = (case.batch, case.tokens)
    found = {
        "q": normal(*rows, case.heads, case.dim, seed=1),
        "k": normal(*rows, case.state_heads, case.dim, seed=2),
        "v": normal(*rows, case.value_heads, case.values, seed=3),
    }
    if case.state:
        size = (case.batch, case.state_heads, features(case.dim))
        found["sums"] = normal(*size, case.values, seed=6)
        if case.normalize:
            found["norms"] = normal(*size, seed=7)
    return {name: x.to(DEVICE) for name, x in found.items()}


def masks(case: Case) -> tuple[Tensor | None, Tensor | None]:
    """Documents, of which the carried one goes on for a while in row 0, and padding in front and in the middle."""
    docs = valid = None
    if case.documents:
        places = (5, 6, 40, 64, 100, 256, 270, 400), (0, 3, 70, 130)
        docs = kernel_calls.documents(case.batch, case.tokens, *places)
    if case.padding:
        valid = torch.ones(case.batch, case.tokens, dtype=torch.bool)
        valid[0, :3] = valid[0, -1] = valid[-1, case.tokens // 2] = False
        valid = valid.to(DEVICE)
    return docs, valid


def run(case: Case, dtype: torch.dtype, form: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Results and gradients by name."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    narrow = ("q", "k", "v")
    x = {n: value.to(dtype if n in narrow else wide).requires_grad_() for n, value in draw(case).items()}
    docs, valid = masks(case)
    state = (x["sums"], x.get("norms")) if case.state else None
    inputs = (x["q"], x["k"], x["v"], case.scale)
    if form == "reference":
        rows = (case.batch, case.tokens)
        docs = torch.zeros(rows, dtype=torch.int64, device=DEVICE) if docs is None else docs
        valid = torch.ones(rows, dtype=torch.bool, device=DEVICE) if valid is None else valid
        if state is None:
            empty = x["k"].new_zeros(case.batch, case.state_heads, features(case.dim), case.values)
            state = (empty, empty[..., 0])
        result = taylor_linear_reference(*inputs, docs, valid, state, normalize=case.normalize)
    else:
        with dispatch.kernels(form):
            options = {"normalize": case.normalize}
            if form == "triton":
                result = taylor_linear_triton(*inputs, docs, valid, state, segments=case.segments, **options)
            else:
                result = taylor_linear_chunk(*inputs, docs, valid, state, **options)
    numerator, denominator, (sums, norms) = result
    assert (denominator is None) == (norms is None) == (not case.normalize)
    found = {"numerator": numerator, "sums": sums}
    if case.normalize:
        found |= {"denominator": denominator, "norms": norms}
    assert all(value.isfinite().all() for value in found.values())
    total = sum(
        (value.to(wide) * normal(*value.shape, seed=9).to(DEVICE, wide)).sum() for value in found.values()
    )
    grads = torch.autograd.grad(total, list(x.values()))
    return {n: value.detach() for n, value in found.items()}, dict(zip(x, grads, strict=True))


@cache
def exact(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return run(case, torch.float64, "reference")


def compare(case: Case, dtype: torch.dtype, form: str) -> None:
    results, gradients = exact(case)
    found, grads = run(case, dtype, form)
    assert found["numerator"].dtype == dtype
    assert all(found[name].dtype == torch.float32 for name in found if name != "numerator")
    errors = {name: error(found[name], results[name]) for name in results}
    errors |= {f"d{name}": error(grads[name], gradients[name]) / 3 for name in grads}
    assert max(errors.values()) < TOLERANCE[dtype], errors


@pytest.mark.parametrize(("case", "dtype"), kernel_calls.cases(PAIRS, RARELY))
def test_equals_the_definition(case, dtype):
    compare(case, dtype, "triton")


@pytest.mark.parametrize("name", ["documents", "shared values", "sums only", "narrow"])
def test_torch_form_equals_the_definition(name):
    compare(CASES[name], torch.float32, "torch")


def test_weights_are_the_expansion():
    """One key, one query: 1 + z + z^2 / 2."""
    x, y = normal(5, 8, seed=1), normal(5, 8, seed=2)
    z = 0.3 * (x * y).sum(-1)
    got = (taylor_features(x, 0.3) * taylor_features(y, 0.3)).sum(-1)
    assert torch.allclose(got, 1 + z + z.square() / 2)


@pytest.mark.parametrize("dim", [8, 16, 32])
@pytest.mark.parametrize("dtype", NARROW, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_one_token_in_place_equals_torch(dim, dtype):
    scale = dim**-0.5
    x = [normal(2, heads, width, seed=heads).to(DEVICE, dtype) for heads, width in ((6, dim), (4, dim))]
    if dim == 8:
        x[0] = x[0][:, :4]
    else:
        x[0] = normal(2, 8, dim, seed=1).to(DEVICE, dtype)
    x.append(normal(2, 2, 40, seed=3).to(DEVICE, dtype))
    sums, norms = normal(2, 4, features(dim), 40, seed=4), normal(2, 4, features(dim), seed=5)
    valid = torch.tensor([True, False], device=DEVICE)
    narrow, exact = (
        [y.to(DEVICE, kind, copy=True) for y in (sums, norms)] for kind in (torch.float32, torch.float64)
    )
    with dispatch.kernels("triton"):
        ours = taylor_linear_step(*x, scale, *narrow, valid=valid)
    theirs = taylor_linear_step(*(y.double() for y in x), scale, *exact, valid=valid)
    assert ours[0].dtype == dtype
    for one, other in zip((*ours, *narrow), (*theirs, *exact), strict=True):
        assert error(one, other) < TOLERANCE[dtype]
    assert torch.equal(narrow[0][1].cpu(), sums[1].float()), (
        "a key that nobody may see leaves the state as it is"
    )


def test_heads_may_stand_in_front_of_rows():
    """As the product of a feature map leaves them; nothing is copied for it."""
    q, k, v = (normal(2, heads, 8, seed=heads).to(DEVICE) for heads in (4, 2, 1))
    sums = normal(2, 2, features(8), 8, seed=4).float().to(DEVICE)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1).float() for x in (q, k)]
    assert not any(x.is_contiguous() for x in turned)
    made = []
    for pair in ((q.float(), k.float()), turned):
        state = sums.clone()
        with dispatch.kernels("triton"):
            made.append((*taylor_linear_step(*pair, v.float(), 0.3, state, None), state))
    for one, other in zip(*made, strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("normalize", [True, False])
def test_tokens_one_by_one_equal_the_sequence(normalize):
    case = Case(tokens=9, heads=2, padding=True)
    x = {name: value.float() for name, value in draw(case).items()}
    valid = masks(case)[1]
    state = [
        torch.zeros(1, 1, 153, 16, device=DEVICE),
        torch.zeros(1, 1, 153, device=DEVICE) if normalize else None,
    ]
    inputs = (x["q"], x["k"], x["v"])
    with dispatch.kernels("triton"):
        out, total, final = taylor_linear_chunk(*inputs, case.scale, None, valid, normalize=normalize)
        steps = [
            taylor_linear_step(*(y[:, t] for y in inputs), case.scale, *state, valid=valid[:, t])
            for t in range(9)
        ]
    assert error(torch.stack([step[0] for step in steps], 1), out) < TOLERANCE[torch.float32]
    assert error(state[0], final[0]) < TOLERANCE[torch.float32]
    if normalize:
        assert error(torch.stack([step[1] for step in steps], 1), total) < TOLERANCE[torch.float32]
        assert error(state[1], final[1]) < TOLERANCE[torch.float32]


def test_no_tokens_and_a_split():
    """Nothing gives the state back, with its gradient; a cut anywhere changes nothing."""
    case = Case(tokens=150, state=True)
    x = {name: value.float() for name, value in draw(case).items()}
    state = (x.pop("sums").requires_grad_(), x.pop("norms").requires_grad_())

    def piece(low: int, high: int, carried):
        part = {n: y[:, low:high].requires_grad_() for n, y in x.items()}
        return taylor_linear_chunk(**part, scale=case.scale, state=carried)

    with dispatch.kernels("triton"):
        nothing, _, same = piece(0, 0, state)
        assert nothing.shape == (1, 0, 1, 16)
        for given, back in zip(state, same, strict=True):
            assert torch.equal(given, back)
            made = torch.autograd.grad(back.sum(), given, retain_graph=True)[0]
            assert torch.equal(made, torch.ones_like(given))
        whole, whole_sum, final = piece(0, 150, state)
        first, first_sum, middle = piece(0, 70, state)
        second, second_sum, last = piece(70, 150, middle)
    ours = [torch.cat([first, second], 1), torch.cat([first_sum, second_sum], 1), *last]
    for one, other in zip(ours, (whole, whole_sum, *final), strict=True):
        assert error(one, other) < TOLERANCE[torch.float32]
    pairs = zip(*(torch.autograd.grad(y.sum(), state) for y in (second, whole[:, 70:])), strict=True)
    for one, other in pairs:
        assert error(one, other) < 3 * TOLERANCE[torch.float32]


def test_what_is_not_covered_is_refused_with_a_remedy():
    x = torch.zeros(1, 3, 1, 24, device=DEVICE)
    with dispatch.kernels("triton"):
        with pytest.raises(dispatch.KernelError, match=r"dim: 24 must be one of.*LINEARIZE_KERNELS=torch"):
            taylor_linear_chunk(x, x, x, 1.0)
        with pytest.raises(dispatch.KernelError, match="dtype"):
            taylor_linear_chunk(x[..., :16], x[..., :16].half(), x[..., :16], 1.0)
        with pytest.raises(dispatch.KernelError, match="sums and norms must be float32 and contiguous"):
            one = x[:, 0, :, :16]
            taylor_linear_step(one, one, one, 1.0, x.new_zeros(1, 1, 16, 153).mT)


def test_compiles_and_checkpoints():
    """One graph under torch.compile, and recomputation under gradient checkpointing gives the same gradients."""
    case = Case(tokens=40, dim=8, padding=True)
    x = {name: value.float().requires_grad_() for name, value in draw(case).items()}
    valid = masks(case)[1]

    def layer(q, k, v):
        out, total, _ = taylor_linear_chunk(q * 1.0, k, v, case.scale, None, valid)
        return out.square() + total[..., None]

    with dispatch.kernels("triton"):
        plain = torch.autograd.grad(layer(**x).sum(), list(x.values()))
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        again = functools.partial(torch.utils.checkpoint.checkpoint, layer, use_reentrant=False)
        for form in (compiled, again):
            for one, two in zip(torch.autograd.grad(form(**x).sum(), list(x.values())), plain, strict=True):
                assert error(one, two) < 1e-6


def test_backward_keeps_no_features():
    """What is kept from forward is q, k, v and a state of every 256 tokens."""
    case = Case(tokens=512, values=64)
    x = {name: value.float().requires_grad_() for name, value in draw(case).items()}
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with dispatch.kernels("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        taylor_linear_chunk(x["q"], x["k"], x["v"], case.scale)
    assert sum(kept) < 512 * (16 + 16 + 64) + 2 * 153 * 65 + 512
