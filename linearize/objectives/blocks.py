"""Query rows of attention matrices in blocks: what keeps objectives on whole matrices at O(T) memory."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from linearize.objectives.base import Call

BLOCK_ELEMENTS = 2**22
"""Weights of a block, B * H * R * T: 16 MB in float32, for each of the few tensors of its graph."""
FEWEST_ROWS = 16


def row_blocks(call: Call) -> list[slice]:
    """Slices that cover all query rows, each of at most `BLOCK_ELEMENTS` weights (but `FEWEST_ROWS` rows).

    A mixer whose rule has no dense form (a gate, a delta rule, slots) computes all rows to show any: one block then.
    """
    batch, tokens, heads = call.q.shape[:3]
    rows = min(tokens, max(FEWEST_ROWS, BLOCK_ELEMENTS // (batch * heads * tokens)))
    if _shows_all_rows(call):
        rows = tokens
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def weight_blocks(call: Call) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Block by block: teacher and student matrices [B, H, R, T], and which of the rows count [B, 1, R] (None: all)."""
    for block in row_blocks(call):
        teacher, student = call.weights(block)
        yield teacher.detach(), student, None if call.valid is None else call.valid[:, None, block]


def _shows_all_rows(call: Call) -> bool:
    recurrent = getattr(getattr(call, "mixer", None), "recurrent", None)
    return recurrent is not None and (recurrent.gate is not None or not recurrent.update.dense)
