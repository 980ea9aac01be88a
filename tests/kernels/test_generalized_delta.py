"""The generalized delta rule: three forms of one function, and the rules that it generalizes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kernel_calls import normal, uniform
from recurrences import BATCH, Recurrence, forms, some_documents

from linearize.kernels.gated_delta import delta_chunk
from linearize.kernels.gated_linear import gated_linear_chunk
from linearize.kernels.generalized_delta import (
    generalized_delta_chunk,
    generalized_delta_reference,
    generalized_delta_step,
)

HEADS, STATE_HEADS, FEATURES, VALUES = 6, 2, 5, 7


def make(strength: float) -> Recurrence:
    """RWKV-7's form (a = -kappa, b = kappa * rate) with log decays down to -strength."""

    def sequence(tokens: int):
        size = (BATCH, tokens, STATE_HEADS, FEATURES)
        kappa = F.normalize(normal(*size, seed=4), dim=-1)
        return {
            "q": normal(BATCH, tokens, HEADS, FEATURES, seed=1),
            "k": normal(*size, seed=2),
            "v": normal(BATCH, tokens, STATE_HEADS, VALUES, seed=3),
            "a": -kappa,
            "b": kappa * uniform(*size, seed=5),
            "log_decay": -strength * uniform(*size, seed=6),
        }

    def whole(form):
        def run(x, docs, state):
            out, new = form(**x, docs=docs, state=state[0])
            return [out], [new]

        return run

    return Recurrence(
        sequence=sequence,
        state=[normal(BATCH, STATE_HEADS, FEATURES, VALUES, seed=7)],
        reference=whole(generalized_delta_reference),
        chunk=whole(generalized_delta_chunk),
        step=lambda x, state: [generalized_delta_step(**x, state=state[0])],
        neutral=("k", "b", "log_decay"),
    )


CASES = {"no_decay": make(0.0), "rwkv7": make(0.6065), "strong": make(20.0)}
TestForms = forms(CASES)


def test_without_moves_it_is_gated_linear_attention():
    case, docs = make(1.0), some_documents(131)
    x, (state,) = case.sequence(131), case.state
    out, after = generalized_delta_chunk(**x | {"b": torch.zeros_like(x["b"])}, docs=docs, state=state)
    plain = {name: x[name] for name in ("q", "k", "v", "log_decay")}
    expected, _, (sums, _) = gated_linear_chunk(**plain, docs=docs, state=(state, None), normalize=False)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(after, sums)


def test_one_decay_and_one_key_make_it_the_gated_delta_rule():
    case, docs = make(1.0), some_documents(131)
    x, (state,) = case.sequence(131), case.state
    k, beta, log_decay = -x["a"], uniform(BATCH, 131, STATE_HEADS), -uniform(BATCH, 131, STATE_HEADS, seed=9)
    written = beta[..., None] * k
    wide = log_decay[..., None].expand_as(k)
    moves = {"k": written, "a": wide.exp() * k, "b": -written, "log_decay": wide}
    ours = generalized_delta_chunk(x["q"], v=x["v"], **moves, docs=docs, state=state)
    expected = delta_chunk(x["q"], k, x["v"], beta, log_decay, docs, state)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)
