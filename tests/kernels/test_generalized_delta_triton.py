"""generalized_delta in Triton against its loop in float64: outputs, states, every gradient, and one token in place."""

from __future__ import annotations

from dataclasses import dataclass

import kernel_calls
import pytest
import torch
import torch.nn.functional as F
from kernel_calls import DEVICE, NARROW, ON_GPU, TOLERANCE, USUAL, error, normal, uniform
from rounded_operands import rounded_operand, rounded_pairs
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.generalized_delta import (
    generalized_delta_chunk,
    generalized_delta_reference,
    generalized_delta_step,
)

DIM, HEADS, STATE_HEADS = (64, 4, 2) if ON_GPU else (16, 1, 1)
"""Alike for most cases on a GPU, where every other shape is compiled anew."""
single, half = torch.float32, torch.float16
NARROWED = ("q", "k", "v", "a", "b")


@dataclass(frozen=True)
class Case:
    """One shape with its options; log decays are uniform down to `-strength`."""

    tokens: int
    batch: int = 1
    heads: int = HEADS
    state_heads: int = STATE_HEADS
    key_dim: int = DIM
    value_dim: int = DIM
    strength: float = 0.6065
    documents: bool = False
    padding: bool = False
    same_keys: bool = False
    rate: float | None = None
    """The in-context learning rate; None: uniform in [0, 1]."""
    erase: bool = False
    """Gated DeltaNet-2's form: a is what an erase gate lets through of the key, read before the state decays."""
    dtypes: tuple[torch.dtype, ...] = USUAL


CASES = {
    "plain": Case(tokens=70, dtypes=tuple(NARROW)),
    "grouped_documents": Case(tokens=150, heads=2 * STATE_HEADS, documents=True, padding=True),
    "two_rows": Case(tokens=66, batch=2, heads=4, state_heads=2, documents=True, dtypes=USUAL[:1]),
    "no_decay": Case(tokens=65, strength=0.0, dtypes=USUAL[:1]),
    "halved": Case(tokens=70, strength=3.0),
    "strong": Case(tokens=150, strength=20.0, documents=True),
    "one": Case(tokens=1, dtypes=USUAL[:1]),
    "short": Case(tokens=7, batch=2, documents=True, dtypes=USUAL[:1]),
    "odd_dims": Case(tokens=10, key_dim=20, value_dim=40),
    "whole_rate": Case(tokens=64, rate=1.0, strength=0.1),
    "same_keys": Case(tokens=64, same_keys=True, rate=1.0, strength=0.0, dtypes=USUAL[:1]),
    "erase": Case(tokens=70, erase=True, heads=2 * STATE_HEADS),
    "erase_strong": Case(tokens=130, erase=True, strength=20.0, documents=True, padding=True),
    "wide_keys": Case(tokens=65, key_dim=128, dtypes=USUAL[:1]),
    "wide_values": Case(tokens=65, value_dim=128, strength=20.0, dtypes=USUAL[:1]),
}
if ON_GPU:
    CASES |= {
        "long": Case(tokens=1000, batch=2, documents=True),
        "long_strong": Case(tokens=1000, batch=2, strength=20.0),
        "long_narrow": Case(tokens=300, key_dim=32, value_dim=32, documents=True, dtypes=tuple(NARROW)),
        "every_dtype": Case(tokens=300, documents=True, dtypes=tuple(NARROW)),
        "every_dtype_strong": Case(tokens=300, strength=20.0, documents=True, dtypes=tuple(NARROW)),
        "wide_documents": Case(tokens=500, key_dim=128, value_dim=128, documents=True, padding=True),
        "wide_strong": Case(tokens=200, key_dim=128, value_dim=128, strength=20.0),
        "dims_64_and_128": Case(tokens=300, value_dim=128),
        "long_erase": Case(tokens=1000, batch=2, erase=True, strength=3.0, documents=True),
        "dim_256": Case(tokens=200, key_dim=256, value_dim=256),
    }
RARELY = {"two_rows", "erase_strong"}
cases = pytest.mark.parametrize("case", kernel_calls.cases(CASES, RARELY))


def draw(case: Case) -> dict[str, Tensor]:
    """Random float64 tensors of a call in RWKV-7's form, or `erase`; padding writes, moves and forgets nothing."""
    size = (case.batch, case.tokens, case.state_heads)
    kappa = F.normalize(normal(*size, case.key_dim, seed=4), dim=-1)
    kappa = kappa[:, :1].expand_as(kappa) if case.same_keys else kappa
    rate = uniform(*size, case.key_dim, seed=5) if case.rate is None else case.rate
    seen = torch.ones(case.batch, case.tokens, 1, 1, dtype=torch.float64)
    if case.padding:
        seen[:, :3] = seen[:, 80:90] = 0
    log_decay = -case.strength * uniform(*size, case.key_dim, seed=6) * seen
    own = {"k": normal(*size, case.key_dim, seed=2) * seen, "a": -kappa, "b": kappa * rate * seen}
    if case.erase:
        own = {"k": kappa * seen, "a": kappa * rate * log_decay.exp(), "b": -kappa * seen}
    return {
        # a layout that is not contiguous
        "q": normal(case.batch, case.heads, case.tokens, case.key_dim, seed=1).transpose(1, 2),
        "k": own["k"],
        "v": normal(case.value_dim, *size, seed=3).movedim(0, -1),
        "a": own["a"],
        "b": own["b"],
        "log_decay": log_decay,
        "state": normal(case.batch, case.state_heads, case.key_dim, case.value_dim, seed=7),
    }


def documents(case: Case) -> Tensor:
    places = [(5, 6, 40, 128, 141, 400), (0, 3, 64, 200)] if case.documents else []
    return kernel_calls.documents(case.batch, case.tokens, *places)


def rounded(x: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What a call in `dtype` is given; log decays and the state are float32."""
    return {name: tensor.to(DEVICE, dtype if name in NARROWED else single) for name, tensor in x.items()}


def call(form, x: dict[str, Tensor], docs: Tensor) -> tuple[Tensor, Tensor]:
    rest = {name: tensor for name, tensor in x.items() if name != "state"}
    return form(**rest, docs=docs, state=x["state"])


def run(x: dict[str, Tensor], docs: Tensor, form) -> dict[str, Tensor]:
    """Output, final state, and gradients by name under random weights of both."""
    x = {name: tensor.detach().requires_grad_() for name, tensor in x.items()}
    with dispatch.kernels("triton"):
        out, state = call(form, x, docs)
    loss = (out * normal(*out.shape, seed=8).to(out)).sum()
    loss = loss + (state * normal(*state.shape, seed=9).to(state)).sum()
    grads = torch.autograd.grad(loss, list(x.values()))
    return {"out": out.detach(), "final": state.detach()} | dict(zip(x, grads, strict=True))


@cases
def test_equals_the_loop(case):
    """On the inputs as they are rounded: what the kernels add to that."""
    docs = documents(case)
    for dtype in case.dtypes:
        x = rounded(draw(case), dtype)
        exact = run({name: tensor.double() for name, tensor in x.items()}, docs, generalized_delta_reference)
        ours = run(x, docs, generalized_delta_chunk)
        assert ours["out"].dtype == dtype and ours["final"].dtype == single
        assert all(ours[name].dtype == x[name].dtype for name in x)
        found = {name: error(ours[name], exact[name]) for name in exact}
        limit = TOLERANCE[dtype]
        if case.strength == 20.0 and dtype == single:
            limit = 1e-4  # decays are differences of sums of hundreds
        assert max(found.values()) < limit, (dtype, found)


@pytest.mark.skipif(ON_GPU, reason="the products' operands are replaced, which the interpreter alone allows")
def test_rounded_operands_cost_the_decays_no_more_than_others(monkeypatch):
    """What pairs on one side of a strong decay give it cancels, however operands are rounded: here as bfloat16 is."""
    from linearize.kernels.generalized_delta import triton_gradients

    monkeypatch.setattr(triton_gradients, "weighed", rounded_pairs)
    monkeypatch.setattr(triton_gradients, "under_decay", rounded_operand)
    for strength in (1.0, 20.0):
        case = Case(tokens=130, strength=strength)
        x, docs = rounded(draw(case), single), documents(case)
        exact = run({name: tensor.double() for name, tensor in x.items()}, docs, generalized_delta_reference)
        found = {name: error(y, exact[name]) for name, y in run(x, docs, generalized_delta_chunk).items()}
        assert 1e-4 < found["k"] < 5e-3 and found["log_decay"] < 5e-3, found


def test_no_tokens():
    case = Case(tokens=0, heads=2, state_heads=2, batch=2)
    x = {name: tensor.requires_grad_() for name, tensor in rounded(draw(case), single).items()}
    with dispatch.kernels("triton"):
        out, state = call(generalized_delta_chunk, x, documents(case))
    assert out.shape == (2, 0, 2, DIM)
    torch.testing.assert_close(state, x["state"], rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(state.sum(), x["state"])
    torch.testing.assert_close(gradient, torch.ones_like(gradient))


def test_a_state_carries_over_a_split_and_nothing_is_kept_without_gradients():
    case = Case(tokens=100, documents=True)
    x, docs = rounded(draw(case), single), documents(case)
    with dispatch.kernels("triton"):
        whole, final = call(generalized_delta_chunk, x, docs)
        head, state = call(
            generalized_delta_chunk, {n: t if n == "state" else t[:, :39] for n, t in x.items()}, docs[:, :39]
        )
        rest = {n: t[:, 39:] for n, t in x.items() if n != "state"} | {"state": state}
        tail, last = call(generalized_delta_chunk, rest, docs[:, 39:] - docs[:, 38:39])
    assert error(torch.cat([head, tail], 1), whole) < 1e-5
    assert error(last, final) < 1e-5


def test_log_decays_may_be_narrow_and_the_state_alone_may_be_trained_on():
    case = Case(tokens=20)
    x = {name: tensor.to(DEVICE, half) for name, tensor in draw(case).items()}
    wide = {name: tensor.double().requires_grad_() for name, tensor in x.items()}
    narrow = {name: tensor.requires_grad_() for name, tensor in x.items()}
    _, exact = call(generalized_delta_reference, wide, documents(case))
    with dispatch.kernels("triton"):
        _, ours = call(generalized_delta_chunk, narrow, documents(case))
    wanted = normal(*exact.shape, seed=9).to(exact)
    names = [name for name in x if name != "q"]
    expected = torch.autograd.grad((exact * wanted).sum(), [wide[name] for name in names])
    found = torch.autograd.grad((ours * wanted.float()).sum(), [narrow[name] for name in names])
    for name, one, other in zip(names, found, expected, strict=True):
        assert one.dtype == half and error(one, other) < TOLERANCE[half], name


def test_compiles_and_checkpoints():
    """One graph under torch.compile, and recomputation under gradient checkpointing gives the same gradients."""
    case = Case(tokens=20)
    x = rounded(draw(case), single)
    names = (*NARROWED, "log_decay")
    trained = [x[name].requires_grad_() for name in names]
    docs, state = documents(case), x["state"]

    def layer(*given):
        given = dict(zip(names, given, strict=True))
        given["q"] = given["q"] * 1.0
        return generalized_delta_chunk(**given, docs=docs, state=state)[0].square()

    with dispatch.kernels("triton"):
        plain = torch.autograd.grad(layer(*trained).sum(), trained)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for other in (compiled, lambda *y: torch.utils.checkpoint.checkpoint(layer, *y, use_reentrant=False)):
            for one, two in zip(torch.autograd.grad(other(*trained).sum(), trained), plain, strict=True):
                assert error(one, two) < 1e-6


def test_what_is_not_covered_is_refused_with_a_remedy():
    case = Case(tokens=3, key_dim=200)
    x = rounded(draw(case), single)
    with dispatch.kernels("triton"):
        with pytest.raises(dispatch.KernelError, match=r"key_dim: 200.*LINEARIZE_KERNELS=torch"):
            call(generalized_delta_chunk, x, documents(case))
        x["a"] = x["a"].half()
        with pytest.raises(dispatch.KernelError, match="dtype"):
            call(generalized_delta_chunk, x, documents(case))


STEPS = {
    "plain": Case(tokens=3, batch=2, heads=2, state_heads=2),
    "grouped": Case(tokens=3, state_heads=2, heads=6, strength=20.0),
    "erase": Case(tokens=3, heads=2, state_heads=1, erase=True, strength=3.0),
    "odd_dims": Case(tokens=3, state_heads=1, heads=2, key_dim=20, value_dim=40),
    "wide": Case(tokens=2, heads=1, state_heads=1, key_dim=128, value_dim=64),
}


@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS)
def test_steps_equal_the_loop_in_place(case):
    for dtype in NARROW:
        x = rounded(draw(case), dtype)
        exact = {name: tensor.double() for name, tensor in x.items()}
        out, final = call(generalized_delta_reference, exact, documents(case))
        state = x.pop("state").clone()
        found = []
        for t in range(case.tokens):
            with dispatch.kernels("triton"):
                given = {name: tensor[:, t] for name, tensor in x.items()}
                found.append(generalized_delta_step(**given, state=state))
        assert found[0].dtype == dtype
        assert error(torch.stack(found, 1), out) < TOLERANCE[dtype]
        assert error(state, final) < TOLERANCE[single]


def test_a_neutral_token_leaves_the_state():
    x = {name: tensor[:, 0] for name, tensor in rounded(draw(STEPS["grouped"]), single).items()}
    state = normal(1, 2, DIM, DIM, seed=9).to(DEVICE, single)
    before, nothing = state.clone(), torch.zeros_like(x["k"])
    with dispatch.kernels("triton"):
        generalized_delta_step(x["q"], nothing, x["v"], x["a"], nothing, nothing, state)
    torch.testing.assert_close(state, before, rtol=0, atol=0)


def test_a_state_that_cannot_be_written_in_place_is_refused():
    x = rounded(draw(STEPS["plain"]), single)
    given = [x[name][:, 0] for name in ("q", "k", "v", "a", "b", "log_decay")]
    with dispatch.kernels("triton"):
        for state in (x["state"].mT, x["state"].half()):
            with pytest.raises(dispatch.KernelError, match="state"):
                generalized_delta_step(*given, state)
