"""What the branches of a mixer read in one call: widened, masked, and with the rotation that each of them sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linearize.mixers.base import accumulator, documents, narrows
from linearize.mixers.given import Given
from linearize.mixers.state import State

if TYPE_CHECKING:
    from linearize.mixers.mixer import Mixer


@dataclass
class Inputs:
    """One call's inputs, widened to the accumulator's dtype.

    Attributes:
        q, k, v: [B, T, H, K], [B, T, N, K], [B, T, N, V].
        valid: [B, T] bool, false on padding.
        docs: [B, T] document numbers.
        hidden: [B, T, D] the layer's input, or None where no part reads it.
        dtype: of the model's own q, k and v.
        front: [B] padding in front of each row, behind which the state's tokens belong, or None.
        bordered: whether a document may begin among the tokens.
        first: [B, T, N, V] values of the model's first converted layer, or None where nobody reads them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    valid: Tensor
    docs: Tensor
    hidden: Tensor | None
    dtype: torch.dtype = torch.float32
    front: Tensor | None = None
    bordered: bool = False
    first: Tensor | None = None


def entering(
    mixer: Mixer, given: Given, front: Tensor | None = None, state: State | None = None
) -> tuple[Inputs, Inputs]:
    """What the window and what the recurrent branch see: in the accumulator's dtype, or as kernels take them.

    Args:
        mixer: whose branches they are.
        given: the call.
        front, state: see `Mixer.run`.
    """
    q, k, v, valid, docs, (hidden, plain, _, first) = given
    batch, tokens = k.shape[:2]
    first = first if mixer.uses_first else None
    assert hidden is not None or not mixer.uses_hidden, "this mixer reads hidden states"
    assert first is not None or not mixer.uses_first, "this mixer reads the first layer's values"
    assert plain is not None or not mixer.needs_plain, "this mixer wants q and k before RoPE"
    if valid is None:
        valid = torch.ones(batch, tokens, dtype=torch.bool, device=k.device)
    own_docs = documents(None, batch, tokens, k.device) if docs is None else docs
    dtype = v.dtype if narrows(q, k, v) else accumulator(v.dtype)
    taken = hidden.to(dtype) if hidden is not None and mixer.uses_hidden else None

    def inputs(rotated: bool) -> Inputs:
        pair = (q, k) if rotated or plain is None else plain
        a, b, c = (x.to(dtype) for x in (*pair, v))
        return Inputs(a, b, c, valid, own_docs, taken, v.dtype, front, docs is not None, first)

    position = mixer.position
    near = inputs(position.window_rotated)
    if mixer.recurrent is None or not position.turns:
        same = mixer.recurrent is None or position.window_rotated == position.recurrent_rotated
        return near, near if same else inputs(position.recurrent_rotated)
    far = inputs(position.recurrent_rotated)
    assert taken is not None
    carried = None if state is None else state["phase"]
    far.q, far.k, last = position.turned(far.q, far.k, taken, valid, own_docs, carried)
    if state is not None:
        state.write({"phase": last.to(state["phase"].dtype)})
    return near, far
