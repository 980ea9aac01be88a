"""Gated linear attention: three forms of one function, safe for every decay."""

from __future__ import annotations

import pytest
import torch
from kernel_calls import normal, uniform
from recurrences import BATCH, Recurrence, forms, one_document, some_documents

from linearize.kernels.gated_linear import gated_linear_chunk, gated_linear_reference, gated_linear_step
from linearize.kernels.linear import linear_chunk

HEADS, STATE_HEADS, FEATURES, VALUES = 6, 2, 5, 7
WIDTHS = {"head": (), "key": (FEATURES,), "value": (VALUES,)}
STRENGTHS = {
    "none": lambda u: 0 * u,
    "mild": lambda u: -u,
    "strong": lambda u: -20 * u,
    "mixed": lambda u: -torch.where(u > 0.5, 20.0 * u, 0.01 * u),
}


def make(over: str, strength: str, *, normalize: bool = True, read_before: bool = False, bonus: bool = False):
    normalize = normalize and over != "value"
    options = {"normalize": normalize, "read_before": read_before, "decay_values": over == "value"}

    def sequence(tokens: int):
        size = (BATCH, tokens, STATE_HEADS)
        return {
            "q": normal(BATCH, tokens, HEADS, FEATURES, seed=1),
            "k": normal(*size, FEATURES, seed=2),
            "v": normal(*size, VALUES, seed=3),
            "log_decay": STRENGTHS[strength](uniform(*size, *WIDTHS[over], seed=4)),
        }

    def whole(form):
        def run(x, docs, state):
            carried = (state[0], state[1] if normalize else None)
            numerator, denominator, new = form(**x, docs=docs, state=carried, **options)
            return (numerator, denominator)[: 1 + normalize], new[: 1 + normalize]

        return run

    def step(x, state):
        kept = {name: value for name, value in options.items() if name != "normalize"}
        return gated_linear_step(**x, sums=state[0], norms=state[1] if normalize else None, **kept)[
            : 1 + normalize
        ]

    sums = normal(BATCH, STATE_HEADS, FEATURES, VALUES, seed=5)
    return Recurrence(
        sequence=sequence,
        state=[sums, normal(BATCH, STATE_HEADS, FEATURES, seed=6)][: 1 + normalize],
        reference=whole(gated_linear_reference),
        chunk=whole(gated_linear_chunk),
        step=step,
        neutral=("k", "log_decay"),
        shared={"bonus": normal(STATE_HEADS, FEATURES, seed=7)} if bonus else {},
    )


CASES = {
    **{f"{over}-{strength}": make(over, strength) for over in WIDTHS for strength in STRENGTHS},
    **{f"{over}-before": make(over, "mixed", read_before=True) for over in WIDTHS},
    **{f"{over}-bonus": make(over, "mixed", bonus=True) for over in WIDTHS},
    **{f"{over}-sums_only": make(over, "mixed", normalize=False) for over in ("head", "key")},
}
TestForms = forms(CASES)


@pytest.mark.parametrize("over", ["head", "key"])
def test_decay_of_one_is_linear_attention(over):
    case = make(over, "none")
    x, docs = case.sequence(131), some_documents(131)
    numerator, denominator, state = gated_linear_chunk(**x, docs=docs, state=tuple(case.state))
    plain = linear_chunk(x["q"], x["k"], x["v"], docs, tuple(case.state))
    for ours, theirs in zip((numerator, denominator, *state), (*plain[:2], *plain[2]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_equal_decays_of_the_dimensions_are_one_of_the_head():
    case = make("head", "mild")
    x, docs = case.sequence(70), some_documents(70)
    wide = x | {"log_decay": x["log_decay"][..., None].expand(-1, -1, -1, FEATURES)}
    one = gated_linear_chunk(**x, docs=docs, state=tuple(case.state))[0]
    torch.testing.assert_close(gated_linear_chunk(**wide, docs=docs, state=tuple(case.state))[0], one)


@pytest.mark.parametrize("over", ["head", "key"])
def test_numerator_over_denominator_is_a_mean(over):
    case = make(over, "mixed")
    x = case.sequence(131)
    x |= {"q": x["q"].exp(), "k": x["k"].exp(), "v": torch.full_like(x["v"], 3.0)}
    empty = tuple(torch.zeros_like(tensor) for tensor in case.state)
    numerator, denominator, _ = gated_linear_chunk(**x, docs=one_document(131), state=empty)
    quotient = numerator / denominator[..., None]
    torch.testing.assert_close(quotient, torch.full_like(quotient, 3.0))


@pytest.mark.parametrize("over", ["head", "key", "value"])
def test_half_a_million_of_decay_in_float32(over):
    case = make(over, "strong", normalize=False)
    x = {name: tensor.float() for name, tensor in case.sequence(300).items()}
    x["log_decay"] = torch.full_like(x["log_decay"], -2000.0)
    leaves = {name: tensor.requires_grad_() for name, tensor in x.items()}
    state = (case.state[0].float(), None)
    options = {"normalize": False, "decay_values": over == "value"}
    out, _, _ = gated_linear_chunk(**leaves, docs=one_document(300), state=state, **options)
    own = (x["q"].unflatten(2, (STATE_HEADS, -1)) * x["k"][:, :, :, None]).sum(-1, keepdim=True)
    torch.testing.assert_close(out, (own * x["v"][:, :, :, None]).flatten(2, 3), rtol=1e-5, atol=1e-5)
    for gradient in torch.autograd.grad(out.square().sum(), leaves.values()):
        assert gradient.isfinite().all()


def test_options_that_contradict_are_refused():
    case = make("value", "mild")
    with pytest.raises(ValueError, match="normalize=False"):
        gated_linear_chunk(
            **case.sequence(3), docs=one_document(3), state=(case.state[0], None), decay_values=True
        )
    with pytest.raises(ValueError, match="power of two"):
        gated_linear_chunk(
            **make("head", "mild").sequence(3), docs=one_document(3), state=(case.state[0], None), chunk=48
        )


@pytest.mark.parametrize("over", ["head", "key", "none"])
def test_sixteen_bit_inputs_are_computed_in_float32(over):
    """What LINEARIZE_KERNELS=torch gives a model in bfloat16: float32 inside, the values' dtype outside."""
    size = (2, 70, STATE_HEADS)
    q, k = normal(2, 70, HEADS, FEATURES, seed=1).bfloat16(), normal(*size, FEATURES, seed=2).bfloat16()
    v = normal(*size, VALUES, seed=3).bfloat16()
    decay = None if over == "none" else -uniform(*size, *WIDTHS[over], seed=4).bfloat16()
    found, norms, state = gated_linear_chunk(q, k, v, decay, None, None)
    wide = [None if x is None else x.float() for x in (q, k, v, decay)]
    expected, wide_norms, wide_state = gated_linear_chunk(*wide, None, None)
    assert found.dtype == torch.bfloat16 and norms.dtype == state[0].dtype == torch.float32
    assert torch.equal(found, expected.bfloat16()) and torch.equal(norms, wide_norms)
    assert torch.equal(state[0], wide_state[0])
