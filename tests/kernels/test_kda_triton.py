"""gated_delta in Triton with a decay for every key dimension against its loop in float64."""

from __future__ import annotations

import kernel_calls
import pytest
import torch
from delta_calls import DIM, HEADS, Case, call, documents, draw, half, run, single
from kernel_calls import DEVICE, NARROW, ON_GPU, TOLERANCE, USUAL, error, normal
from rounded_operands import rounded_operand

from linearize.kernels import dispatch
from linearize.kernels.gated_delta import delta_chunk, delta_reference, delta_step, triton_key_gradient


def case(tokens: int, **options) -> Case:
    return Case(tokens=tokens, per_key=True, **options)


CASES = {
    "mild": case(70),
    "grouped_documents": case(
        150, heads=max(2, HEADS), documents=True, padding=True, strength=0.5, dtypes=tuple(NARROW)
    ),
    "two_rows": case(66, batch=2, heads=4, state_heads=2, documents=True, dtypes=USUAL[:1]),
    # halved once, more than once, and down to single tokens
    "halved": case(66, strength=4.0),
    "halved_grouped_documents": case(
        140, heads=2 * max(2, HEADS), documents=True, padding=True, strength=6.0, dtypes=USUAL[:1]
    ),
    "strong": case(66, strength=20.0),
    "strongest": case(40, strength=500.0, dtypes=USUAL[:1]),
    "one": case(1, dtypes=USUAL[:1]),
    "short": case(7, batch=2, documents=True, dtypes=USUAL[:1]),
    "odd_dims": case(10, key_dim=20, value_dim=40),
    "reflecting": case(64, largest_beta=2.0),
    "same_keys": case(64, same_keys=True, strength=0.01, dtypes=USUAL[:1]),
    "wide": case(65, key_dim=128, value_dim=128, dtypes=USUAL[:1]),
    "wide_halved": case(34, key_dim=128, value_dim=32, strength=8.0, dtypes=USUAL[:1]),
}
if ON_GPU:
    CASES |= {
        "long": case(1000, batch=2, documents=True, strength=1.0),
        "long_halved": case(1000, batch=2, documents=True, strength=5.0),
        "one_query_head_each": case(300, heads=2),
        "wide_documents": case(500, key_dim=128, value_dim=128, documents=True, padding=True),
        "dims_64_and_128": case(300, value_dim=128),
        "dims_128_and_64": case(300, key_dim=128, strength=3.0),
        "dim_256": case(200, key_dim=256, value_dim=256, strength=2.0),
        "dim_32": case(200, key_dim=32, value_dim=32, strength=2.0, dtypes=tuple(NARROW)),
    }
RARELY = {"two_rows", "halved_grouped_documents", "strong", "wide_halved"}
cases = pytest.mark.parametrize("case", kernel_calls.cases(CASES, RARELY))


@cases
def test_equals_the_loop(case):
    exact = run(case, None, delta_reference)
    for dtype in case.dtypes:
        found = {name: error(ours, exact[name]) for name, ours in run(case, dtype, delta_chunk).items()}
        limit = TOLERANCE[dtype]
        if case.same_keys and dtype == torch.bfloat16:
            limit *= 2  # every key the same: what is left of sums that cancel
        assert max(found.values()) < limit, (dtype, found)


@pytest.mark.skipif(ON_GPU, reason="the products' operands are replaced, which the interpreter alone allows")
@pytest.mark.parametrize("strength", [1.0, 20.0])
def test_rounded_operands_cost_the_decays_no_more_than_others(strength, monkeypatch):
    """What pairs on one side of a strong decay give it cancels, however operands are rounded: here as bfloat16 is."""
    monkeypatch.setattr(triton_key_gradient, "under_decay", rounded_operand)
    given = case(130, strength=strength)
    exact, ours = run(given, None, delta_reference), run(given, single, delta_chunk)
    wanted, found = exact["log_decay"], ours["log_decay"].double()
    # of every dimension, since strong decays have small gradients
    worst = ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max().item()
    assert 1e-4 < error(ours["k"], exact["k"]) < 5e-3 and worst < 1e-2, worst


def test_chunks_of_one_call_may_be_halved_and_whole():
    one = case(200, strength=0.1)
    x = {name: tensor.to(DEVICE) for name, tensor in draw(one).items()}
    x["log_decay"][:, 64:130] *= 60.0
    wide = {name: tensor.requires_grad_() for name, tensor in x.items()}
    narrow = {name: tensor.detach().to(single).requires_grad_() for name, tensor in x.items()}
    found = []
    for form, given in ((delta_reference, wide), (delta_chunk, narrow)):
        with dispatch.kernels("triton"):
            out, state = call(form, given, documents(one))
        wanted = [normal(*y.shape, seed=7).to(y) for y in (out, state)]
        loss = sum((y * w).sum() for y, w in zip((out, state), wanted, strict=True))
        found.append([out, state, *torch.autograd.grad(loss, list(given.values()))])
    for exact, ours in zip(*found, strict=True):
        assert error(ours, exact) < TOLERANCE[single]


def test_one_decay_for_all_dimensions_is_that_of_the_head():
    one = Case(tokens=90, documents=True, strength=0.5)
    x = {name: tensor.to(DEVICE, single) for name, tensor in draw(one).items()}
    with dispatch.kernels("triton"):
        expected = call(delta_chunk, x, documents(one))
        x["log_decay"] = x["log_decay"][..., None].expand(-1, -1, -1, DIM)
        for ours, other in zip(call(delta_chunk, x, documents(one)), expected, strict=True):
            assert error(ours, other) < TOLERANCE[single]


def test_no_tokens():
    empty = case(0, heads=2, state_heads=2, batch=2)
    x = {name: tensor.to(DEVICE, single).requires_grad_() for name, tensor in draw(empty).items()}
    with dispatch.kernels("triton"):
        out, state = call(delta_chunk, x, documents(empty))
    assert out.shape == (2, 0, 2, DIM)
    torch.testing.assert_close(state, x["state"], rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(state.sum(), x["state"])
    torch.testing.assert_close(gradient, torch.ones_like(gradient))


def test_a_state_carries_over_a_split():
    one = case(100, documents=True, strength=1.0)
    x = {name: tensor.to(DEVICE, single) for name, tensor in draw(one).items()}
    docs = documents(one)
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
    one = case(20)
    x = {name: tensor.to(DEVICE, half) for name, tensor in draw(one).items()}
    wide = {name: tensor.double().requires_grad_() for name, tensor in x.items()}
    narrow = {name: tensor.requires_grad_() for name, tensor in x.items()}
    _, exact = call(delta_reference, wide, documents(one))
    with dispatch.kernels("triton"):
        _, ours = call(delta_chunk, narrow, documents(one))
    wanted = normal(*exact.shape, seed=9).to(exact)
    names = [name for name in x if name != "q"]
    expected = torch.autograd.grad((exact * wanted).sum(), [wide[name] for name in names])
    found = torch.autograd.grad((ours * wanted.float()).sum(), [narrow[name] for name in names])
    for name, mine, other in zip(names, found, expected, strict=True):
        assert mine.dtype == half and error(mine, other) < TOLERANCE[half], name


def test_compiles_and_checkpoints():
    """One graph under torch.compile, and recomputation under gradient checkpointing gives the same gradients."""
    one = case(20)
    x = {name: tensor.to(DEVICE, single) for name, tensor in draw(one).items()}
    trained = [x[name].requires_grad_() for name in ("q", "k", "v", "beta", "log_decay")]
    docs, state = documents(one), x["state"]

    def layer(q, k, v, beta, log_decay):
        return delta_chunk(q * 1.0, k, v, beta, log_decay, docs, state)[0].square()

    with dispatch.kernels("triton"):
        plain = torch.autograd.grad(layer(*trained).sum(), trained)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for other in (compiled, lambda *y: torch.utils.checkpoint.checkpoint(layer, *y, use_reentrant=False)):
            for mine, two in zip(torch.autograd.grad(other(*trained).sum(), trained), plain, strict=True):
                assert error(mine, two) < 1e-6


def test_decays_of_another_shape_are_refused():
    one = case(3)
    x = {name: tensor.to(DEVICE, single) for name, tensor in draw(one).items()}
    x["log_decay"] = x["log_decay"][..., :1]
    with dispatch.kernels("triton"), pytest.raises(dispatch.KernelError, match="log_decay"):
        call(delta_chunk, x, documents(one))


STEPS = {
    "plain": case(3, batch=2, heads=2, state_heads=2),
    "grouped": case(3, state_heads=2, heads=6, strength=0.5),
    "odd_dims": case(3, state_heads=1, heads=2, key_dim=20, value_dim=40, strength=20.0),
    "wide": case(2, heads=1, state_heads=1, key_dim=128, value_dim=64),
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
            given = [x[name][:, t] for name in ("q", "k", "v", "beta", "log_decay")]
            with dispatch.kernels("triton"):
                found.append(delta_step(*given, state))
        assert found[0].dtype == dtype
        assert error(torch.stack(found, 1), out) < TOLERANCE[dtype]
        assert error(state, final) < TOLERANCE[dtype]
