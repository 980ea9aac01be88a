"""gated_delta in Triton against its loop in float64: outputs, states, every gradient, and one token in place."""

from __future__ import annotations

from dataclasses import replace

import kernel_calls
import pytest
import torch
from delta_calls import DIM, HEADS, Case, call, documents, draw, half, run, single
from kernel_calls import DEVICE, NARROW, ON_GPU, TOLERANCE, USUAL, error, normal

from linearize.kernels import dispatch
from linearize.kernels.gated_delta import delta_chunk, delta_reference, delta_step

CASES = {
    "plain": Case(tokens=70, strength=None),
    "grouped_documents": Case(
        tokens=150, heads=max(2, HEADS), documents=True, padding=True, strength=0.5, dtypes=tuple(NARROW)
    ),
    "two_rows": Case(
        tokens=66, batch=2, heads=4, state_heads=2, documents=True, strength=None, dtypes=USUAL[:1]
    ),
    "strong": Case(tokens=70, strength=20.0),
    "one": Case(tokens=1, dtypes=USUAL[:1]),
    "short": Case(tokens=7, batch=2, documents=True, dtypes=USUAL[:1]),
    "odd_dims": Case(tokens=10, key_dim=20, value_dim=40),
    "reflecting": Case(tokens=64, largest_beta=2.0),
    "same_keys": Case(tokens=64, same_keys=True, strength=None, dtypes=USUAL[:1]),
    "wide": Case(tokens=65, key_dim=128, value_dim=128, dtypes=USUAL[:1]),
}
if ON_GPU:
    CASES |= {
        "long": Case(tokens=1000, batch=2, documents=True, strength=1.0),
        "long_plain": Case(tokens=1000, strength=None),
        "one_query_head_each": Case(tokens=300, heads=2),
        "wide_documents": Case(tokens=500, key_dim=128, value_dim=128, documents=True, padding=True),
        "dims_64_and_128": Case(tokens=300, value_dim=128),
        "dim_256": Case(tokens=200, key_dim=256, value_dim=256),
    }
RARELY = {"two_rows", "strong"}
cases = pytest.mark.parametrize("case", kernel_calls.cases(CASES, RARELY))


@cases
def test_equals_the_loop(case):
    exact = run(case, None, delta_reference)
    for dtype in case.dtypes:
        found = {name: error(ours, exact[name]) for name, ours in run(case, dtype, delta_chunk).items()}
        limit = TOLERANCE[dtype]
        if case.strength == 20.0 and dtype == single:
            limit = 1e-4  # decays are differences of sums of hundreds
        if case.same_keys and dtype == torch.bfloat16:
            limit *= 2  # every key the same: what is left of sums that cancel (0.019 on an H100)
        assert max(found.values()) < limit, (dtype, found)


def test_no_tokens():
    case = Case(tokens=0, heads=2, state_heads=2, batch=2)
    x = {name: tensor.to(DEVICE, single).requires_grad_() for name, tensor in draw(case).items()}
    with dispatch.kernels("triton"):
        out, state = call(delta_chunk, x, documents(case))
    assert out.shape == (2, 0, 2, DIM)
    torch.testing.assert_close(state, x["state"], rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(state.sum(), x["state"])
    torch.testing.assert_close(gradient, torch.ones_like(gradient))


def test_a_state_carries_over_a_split():
    case = Case(tokens=100, documents=True)
    x = {name: tensor.to(DEVICE, single) for name, tensor in draw(case).items()}
    docs = documents(case)
    with dispatch.kernels("triton"):
        whole, final = call(delta_chunk, x, docs)
        head, state = call(
            delta_chunk, {n: t if n == "state" else t[:, :39] for n, t in x.items()}, docs[:, :39]
        )
        rest = {n: t[:, 39:] for n, t in x.items() if n != "state"} | {"state": state}
        tail, last = call(delta_chunk, rest, docs[:, 39:] - docs[:, 38:39])
    assert error(torch.cat([head, tail], 1), whole) < 1e-5
    assert error(last, final) < 1e-5


def test_gates_may_be_narrow_and_the_state_alone_may_be_trained_on():
    case = Case(tokens=20)
    x = {name: tensor.to(DEVICE, half) for name, tensor in draw(case).items()}
    wide = {name: tensor.double().requires_grad_() for name, tensor in x.items()}
    narrow = {name: tensor.requires_grad_() for name, tensor in x.items()}
    _, exact = call(delta_reference, wide, documents(case))
    with dispatch.kernels("triton"):
        _, ours = call(delta_chunk, narrow, documents(case))
    wanted = normal(*exact.shape, seed=9).to(exact)
    names = [name for name in x if name != "q"]
    expected = torch.autograd.grad((exact * wanted).sum(), [wide[name] for name in names])
    found = torch.autograd.grad((ours * wanted.float()).sum(), [narrow[name] for name in names])
    for name, one, other in zip(names, found, expected, strict=True):
        assert one.dtype == half and error(one, other) < TOLERANCE[half], name


@pytest.mark.parametrize("strength", [None, 0.5])
def test_what_is_not_kept_is_made_again(strength):
    """Bit for bit, and nothing that grows with chunks is kept; the state's gradient is there too."""
    case = Case(tokens=70, strength=strength, documents=True)
    x = {name: tensor.to(DEVICE, single).requires_grad_() for name, tensor in draw(case).items()}
    docs, found, kept = documents(case), [], []
    for keeps in (True, False):
        sizes = []
        with (
            dispatch.kernels("triton"),
            torch.autograd.graph.saved_tensors_hooks(lambda y, s=sizes: s.append(y.shape) or y, lambda y: y),
        ):
            out, state = delta_chunk(
                x["q"], x["k"], x["v"], x["beta"], x.get("log_decay"), docs, x["state"], keeps=keeps
            )
        kept.append(sum(len(size) == 5 and 0 not in size for size in sizes))
        found.append([out, state, *torch.autograd.grad(out.square().sum() + state.sum(), [*x.values()])])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=0, rtol=0)
    assert kept == [3, 0]


def test_compiles_and_checkpoints():
    """One graph under torch.compile, and recomputation under gradient checkpointing gives the same gradients."""
    case = Case(tokens=20)
    x = {name: tensor.to(DEVICE, single) for name, tensor in draw(case).items()}
    trained = [x[name].requires_grad_() for name in ("q", "k", "v", "beta", "log_decay")]
    docs, state = documents(case), x["state"]

    def layer(q, k, v, beta, log_decay):
        return delta_chunk(q * 1.0, k, v, beta, log_decay, docs, state)[0].square()

    with dispatch.kernels("triton"):
        plain = torch.autograd.grad(layer(*trained).sum(), trained)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for other in (compiled, lambda *y: torch.utils.checkpoint.checkpoint(layer, *y, use_reentrant=False)):
            for one, two in zip(torch.autograd.grad(other(*trained).sum(), trained), plain, strict=True):
                assert error(one, two) < 1e-6


def test_what_is_not_covered_is_refused_with_a_remedy():
    case = Case(tokens=3, key_dim=200)
    x = {name: tensor.to(DEVICE, single) for name, tensor in draw(case).items()}
    with dispatch.kernels("triton"):
        with pytest.raises(dispatch.KernelError, match=r"key_dim: 200.*LINEARIZE_KERNELS=torch"):
            call(delta_chunk, x, documents(case))
        x["k"] = x["k"].half()
        with pytest.raises(dispatch.KernelError, match="dtype"):
            call(delta_chunk, x, documents(case))


STEPS = {
    "plain": Case(tokens=3, batch=2, heads=2, state_heads=2, strength=None),
    "grouped": Case(tokens=3, state_heads=2, heads=6, strength=0.5),
    "odd_dims": Case(tokens=3, state_heads=1, heads=2, key_dim=20, value_dim=40),
    "wide": Case(tokens=2, heads=1, state_heads=1, key_dim=128, value_dim=64),
}


@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS)
def test_steps_equal_the_loop_in_place(case):
    exact = {name: tensor.to(DEVICE) for name, tensor in draw(case).items()}
    out, final = call(delta_reference, exact, documents(case))
    for dtype in NARROW:
        x = {name: tensor.to(dtype if name in "qkv" else single) for name, tensor in exact.items()}
        state = x.pop("state").clone()
        found = []
        for t in range(case.tokens):
            given = {name: tensor[:, t] for name, tensor in x.items()}
            with dispatch.kernels("triton"):
                found.append(
                    delta_step(
                        given["q"], given["k"], given["v"], given["beta"], given.get("log_decay"), state
                    )
                )
        assert found[0].dtype == dtype
        assert error(torch.stack(found, 1), out) < TOLERANCE[dtype]
        assert error(state, final) < TOLERANCE[dtype]


def test_a_neutral_token_leaves_the_state():
    x = {name: tensor.to(DEVICE, single)[:, 0] for name, tensor in draw(replace(STEPS["grouped"])).items()}
    state = normal(1, 2, DIM, DIM, seed=9).to(DEVICE, single)
    before, nothing = state.clone(), torch.zeros_like(x["beta"])
    with dispatch.kernels("triton"):
        delta_step(x["q"], x["k"], x["v"], nothing, nothing, state)
    torch.testing.assert_close(state, before, rtol=0, atol=0)


def test_a_state_that_cannot_be_written_in_place_is_refused():
    x = {name: tensor.to(DEVICE, single) for name, tensor in draw(STEPS["plain"]).items()}
    given = [x[name][:, 0] for name in ("q", "k", "v", "beta")]
    with dispatch.kernels("triton"):
        for state in (x["state"].mT, x["state"].half()):
            with pytest.raises(dispatch.KernelError, match="state"):
                delta_step(*given, None, state)
