"""Gated slots: three forms of one function."""

from __future__ import annotations

import torch
from kernel_calls import normal, uniform
from recurrences import BATCH, Recurrence, forms, one_document

from linearize.kernels.slots import slots_chunk, slots_reference, slots_step

HEADS, STATE_HEADS, KEYS, VALUES, SLOTS = 6, 2, 5, 7, 4


def make(strength: float, *, complement: bool = False) -> Recurrence:
    """Log decays down to -strength; writes of their own, or 1 - decay as in the paper."""

    def sequence(tokens: int):
        size = (BATCH, tokens, STATE_HEADS)
        log_decay = -strength * uniform(*size, SLOTS, seed=5)
        return {
            "q": normal(BATCH, tokens, HEADS, KEYS, seed=1),
            "k": normal(*size, KEYS, seed=2),
            "v": normal(*size, VALUES, seed=3),
            "writes": -log_decay.expm1() if complement else normal(*size, SLOTS, seed=4),
            "log_decay": log_decay,
        }

    def whole(form):
        def run(x, docs, state):
            out, new = form(**x, docs=docs, state=tuple(state))
            return [out], new

        return run

    return Recurrence(
        sequence=sequence,
        state=[
            normal(BATCH, STATE_HEADS, KEYS, SLOTS, seed=6),
            normal(BATCH, STATE_HEADS, SLOTS, VALUES, seed=7),
        ],
        reference=whole(slots_reference),
        chunk=whole(slots_chunk),
        step=lambda x, state: [slots_step(**x, keys=state[0], values=state[1])],
        neutral=("writes", "log_decay"),
    )


CASES = {"own_writes": make(1.0), "mild": make(0.1, complement=True), "strong": make(20.0, complement=True)}
TestForms = forms(CASES)


def test_a_slot_a_token_is_softmax_attention():
    """As many slots as tokens, no decay, each token written to its own slot: the last query attends to all tokens."""
    tokens = SLOTS
    x = make(1.0).sequence(tokens)
    x["log_decay"] = torch.zeros_like(x["log_decay"])
    x["writes"] = torch.eye(SLOTS, dtype=torch.float64)[None, :, None].expand_as(x["writes"])
    empty = (
        torch.zeros(BATCH, STATE_HEADS, KEYS, SLOTS, dtype=torch.float64),
        torch.zeros(BATCH, STATE_HEADS, SLOTS, VALUES, dtype=torch.float64),
    )
    out, _ = slots_chunk(**x, docs=one_document(tokens), state=empty)
    group = HEADS // STATE_HEADS
    k, v = (x[name].repeat_interleave(group, 2).transpose(1, 2) for name in ("k", "v"))
    q = x["q"][:, -1:].transpose(1, 2)
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)
    torch.testing.assert_close(out[:, -1], attended[:, :, 0])
