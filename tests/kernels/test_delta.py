"""The delta rule, plain and gated per head or feature: three forms of one function, and what it is for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_calls import normal, uniform
from recurrences import BATCH, Recurrence, forms, one_document, some_documents

from linearize.kernels.gated_delta import delta_chunk, delta_reference, delta_step
from linearize.kernels.gated_linear import gated_linear_chunk
from linearize.kernels.generalized_delta import generalized_delta_reference

HEADS, STATE_HEADS, FEATURES, VALUES = 6, 2, 5, 7


def make(strength: float | None, *, largest_beta: float = 1.0, per_feature: bool = False) -> Recurrence:
    """Log decays down to -strength, or no decay."""

    def sequence(tokens: int):
        size = (BATCH, tokens, STATE_HEADS)
        inputs = {
            "q": normal(BATCH, tokens, HEADS, FEATURES, seed=1),
            "k": F.normalize(normal(*size, FEATURES, seed=2), dim=-1),
            "v": normal(*size, VALUES, seed=3),
            "beta": largest_beta * uniform(*size, seed=4),
        }
        if strength is None:
            return inputs
        return inputs | {"log_decay": -strength * uniform(*size, *[FEATURES] * per_feature, seed=5)}

    def whole(form):
        def run(x, docs, state):
            out, new = form(**({"log_decay": None} | x), docs=docs, state=state[0])
            return [out], [new]

        return run

    return Recurrence(
        sequence=sequence,
        state=[normal(BATCH, STATE_HEADS, FEATURES, VALUES, seed=6)],
        reference=whole(delta_reference),
        chunk=whole(delta_chunk),
        step=lambda x, state: [delta_step(**({"log_decay": None} | x), state=state[0])],
        neutral=("beta", "log_decay")[: 2 if strength is not None else 1],
    )


CASES = {
    "plain": make(None),
    "reflecting": make(None, largest_beta=2.0),
    "mild": make(0.1),
    "strong": make(20.0),
    "mild_per_feature": make(0.1, per_feature=True),
    "strong_per_feature": make(20.0, per_feature=True),
}
TestForms = forms(CASES)


@pytest.mark.parametrize("form", [delta_chunk, delta_reference])
def test_beta_of_zero_leaves_the_state(form):
    case = make(None, largest_beta=0.0)
    x, (state,) = case.sequence(131), case.state
    out, after = form(**x, log_decay=None, docs=one_document(131), state=state)
    torch.testing.assert_close(after, state)
    read = torch.einsum("btmgf,bmfv->btmgv", x["q"].unflatten(2, (STATE_HEADS, -1)), state).flatten(2, 3)
    torch.testing.assert_close(out, read)


def test_beta_of_one_stores_the_value():
    case = make(None)
    x = case.sequence(131)
    x |= {"beta": torch.ones_like(x["beta"]), "q": x["k"].repeat_interleave(HEADS // STATE_HEADS, 2)}
    out, _ = delta_chunk(**x, log_decay=None, docs=some_documents(131), state=case.state[0])
    torch.testing.assert_close(out, x["v"].repeat_interleave(HEADS // STATE_HEADS, 2))


@pytest.mark.parametrize("per_feature", [False, True])
def test_orthogonal_keys_make_it_gated_linear_attention(per_feature):
    x = make(0.1, per_feature=per_feature).sequence(FEATURES)
    eye = torch.eye(FEATURES, dtype=torch.float64)
    x["k"] = eye[None, :, None].expand_as(x["k"])
    empty = torch.zeros(BATCH, STATE_HEADS, FEATURES, VALUES, dtype=torch.float64)
    out, state = delta_chunk(**x, docs=one_document(FEATURES), state=empty)
    beta = x.pop("beta")
    x["k"] = x["k"] * beta[..., None]
    plain, _, (sums, _) = gated_linear_chunk(
        **x, docs=one_document(FEATURES), state=(empty, None), normalize=False
    )
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(state, sums)


@pytest.mark.parametrize("beta", [1.0, 1.5, 2.0])
def test_repeated_keys_cost_chunks_no_more_digits_than_the_loop(beta):
    """The hardest triangular system: one key again and again, replaced (beta 1), overshot, or reflected (beta 2)."""
    case = make(None)
    x = case.sequence(256)
    x |= {"k": x["k"][:, :1].expand_as(x["k"]), "beta": torch.full_like(x["beta"], beta)}
    given = {"log_decay": None, "docs": one_document(256)}
    expected, _ = delta_reference(**x, **given, state=case.state[0])
    narrow = {name: tensor.float() for name, tensor in x.items()} | given
    chunked, looped = (
        (form(**narrow, state=case.state[0].float())[0] - expected).abs().max()
        for form in (delta_chunk, delta_reference)
    )
    assert chunked < 5 * looped


@pytest.mark.parametrize("tokens", [9, 131])
def test_equal_decays_of_all_features_are_one_of_the_head(tokens):
    case = make(2.0)
    x = case.sequence(tokens)
    given = {"docs": some_documents(tokens), "state": case.state[0]}
    expected = delta_chunk(**x, **given)
    x["log_decay"] = x["log_decay"][..., None].expand(-1, -1, -1, FEATURES)
    for form in (delta_chunk, delta_reference):
        for one, other in zip(form(**x, **given), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_it_is_a_generalized_delta_rule():
    """One key removed after the decay is one of RWKV-7's family: a = exp(log_decay) k, b = -beta k (its docstring)."""
    case = make(1.0, per_feature=True)
    x = case.sequence(70)
    given = {"docs": some_documents(70), "state": case.state[0]}
    strength = x["beta"][..., None]
    other = generalized_delta_reference(
        x["q"],
        strength * x["k"],
        x["v"],
        x["log_decay"].exp() * x["k"],
        -strength * x["k"],
        x["log_decay"],
        **given,
    )
    for one, two in zip(delta_chunk(**x, **given), other, strict=True):
        torch.testing.assert_close(one, two)
