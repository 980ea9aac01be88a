"""Compositions that one kernel computes: window softmax and Hedgehog's linear past under one normalizer (LoLCATs).

Recognized once, when a mixer is built. On a device with Triton their chunked and one-token forms are then
`kernels.window_linear`, with q, k and v in the model's own dtype; everywhere else, and for every other composition,
they run part by part. Both read and write the same state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.window_linear import window_linear
from linearize.kernels.window_linear.recurrent import window_linear_step
from linearize.mixers.base import documents
from linearize.mixers.combine.shared_normalizer import SharedNormalizer
from linearize.mixers.feature_map.hedgehog import Hedgehog
from linearize.mixers.recurrent import Recurrent
from linearize.mixers.state import State
from linearize.mixers.update.additive import Additive
from linearize.mixers.window.ring import RingWindow

if TYPE_CHECKING:
    from linearize.mixers.mixer import Mixer

MAP_DIMS = (16, 32, 64, 128)
"""Columns of a feature map's matrix that the kernel takes."""
HEAD_DIM = 256
"""Widest head that the kernel takes."""


def is_covered(mixer: Mixer) -> bool:
    """Whether `window_linear` computes the mixer's branches and how they are joined."""
    shape, window, recurrent = mixer.shape, mixer.window, mixer.recurrent
    if max(shape.key_dim, shape.value_dim) > HEAD_DIM:
        return False
    if window.size and not (isinstance(window, RingWindow) and window.kernel_covers):
        return False
    if recurrent is None:
        return window.size != 0
    if window.size:
        joined = isinstance(mixer.combine, SharedNormalizer) and not mixer.combine.config.stabilized
        same = mixer.position.window_rotated == mixer.position.recurrent_rotated
        if not joined or not same or getattr(window, "overlap", False):
            return False
    return _is_hedgehog(recurrent)


def _is_hedgehog(recurrent: Recurrent) -> bool:
    made = recurrent.feature_map
    return (
        isinstance(made, Hedgehog)
        and made.config.activation == "softmax"
        and made.config.space == "full"
        and made.config.dim in MAP_DIMS
        and type(recurrent.update) is Additive
        and recurrent.normalizer.running_sum
        and recurrent.gate is None
        and recurrent.short_conv is None
    )


def runs(mixer: Mixer, *tensors: Tensor) -> bool:
    """Whether this call goes to the kernel."""
    return mixer.is_covered and mixer.branch_off is None and dispatch.use_triton(*tensors)


def chunked(
    mixer: Mixer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    docs: Tensor | None,
    state: State | None,
    front: Tensor | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """`Mixer.chunked` up to the output part, [B, T, H, V] in the dtype of v; q and k as the branches see them.

    Args:
        docs: [B, T] document numbers, or None for one document.
        front: [B] padding in front of each row, behind which the state belongs, or None.
    """
    # under autocast a rotary embedding leaves q and k in float32
    q, k = q.to(v.dtype), k.to(v.dtype)
    window, tokens = mixer.window, q.shape[1]
    codes = reach = least = None
    span = 0
    whole = valid is None and docs is None
    if isinstance(window, RingWindow):
        span = window.span
    if state is None and whole and not (isinstance(window, RingWindow) and window.has_reach):
        ring_k, ring_v, prefix = k, v, 0
    else:
        batch, device = k.shape[0], k.device
        state_given = state is not None
        if state is None:
            state = mixer.initial_state(batch, k.dtype, device)
        if valid is None:
            valid = torch.ones(batch, tokens, dtype=torch.bool, device=device)
        if docs is None:
            docs = documents(None, batch, tokens, device)
        ring_k, ring_v, ring_valid, ring_docs, prefix = k, v, valid, docs, 0
        position = None
        if isinstance(window, RingWindow):
            position = window.positions(valid, docs, state, front)
            reach = window.reach(None if position is None else position[:, span:])
            least = None if reach is None else window.least
            if state_given:
                prefix = span
                ring_k, ring_v, ring_valid, ring_docs = window.behind(state, k, v, valid, docs, front)
                if reach is not None and position is not None:
                    # a ring is longer than what its queries see: its oldest keys are in the sums
                    ring_valid = ring_valid & ~window.handed_on(position, front)
        codes = torch.where(ring_valid, ring_docs, -1 - ring_docs).to(torch.int32)
        if reach is not None:
            reach = reach.to(torch.int32)
        if not state_given:
            state = None
    query_map, key_map, past = None, None, None
    if mixer.recurrent is not None:
        query_map, key_map = _maps(mixer.recurrent)
        past = None if state is None else (state["sums"], state["norms"])
    out, last = window_linear(
        q, ring_k, ring_v, query_map, key_map, window=span, scaling=mixer.shape.scaling,
        window_weight=_share(mixer), linear_weight=_rest(mixer), sink=_sink(mixer, sink),
        codes=codes, reach=reach, least=least, prefix=prefix, state=past, return_state=state is not None,
    )  # fmt: skip
    if state is not None:
        if last is not None:
            state.write({"sums": last[0].detach(), "norms": last[1].detach()})
        if isinstance(window, RingWindow):
            assert docs is not None
            kept = ring_valid[:, tokens:] & (ring_docs[:, tokens:] == docs[:, -1:])
            window.refill(state, ring_k[:, tokens:].detach(), ring_v[:, tokens:].detach(), kept)
    return out


def step(
    mixer: Mixer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    state: State,
    sink: Tensor | None = None,
) -> Tensor:
    """`Mixer.step` up to the output part, [B, 1, H, V] in the dtype of v, in place on the state."""
    q, k = q.to(v.dtype), k.to(v.dtype)
    window = mixer.window
    query_map, key_map, past = None, None, None
    if mixer.recurrent is not None:
        query_map, key_map = _maps(mixer.recurrent)
        past = (state["sums"], state["norms"])
    out = window_linear_step(
        q[:, 0], k[:, 0], v[:, 0], query_map, key_map, scaling=mixer.shape.scaling,
        ring=window.ring(state) if isinstance(window, RingWindow) else None, state=past,
        sink=_sink(mixer, sink), valid=None if valid is None else valid[:, 0],
        window_factor=mixer.combine.window_factor if isinstance(mixer.combine, SharedNormalizer) else None,
        complement=_complement(mixer),
    )  # fmt: skip
    return out[:, None]


def _sink(mixer: Mixer, given: Tensor | None) -> Tensor | None:
    return mixer.window.sinks(given) if isinstance(mixer.window, RingWindow) else None


def _maps(recurrent: Recurrent) -> tuple[Tensor, Tensor]:
    made = recurrent.feature_map
    assert isinstance(made, Hedgehog) and made.query_weight is not None
    key_weight = made.query_weight if made.tied else made.key_weight
    assert key_weight is not None
    return made.query_weight, key_weight


def _share(mixer: Mixer) -> Tensor | None:
    return mixer.combine.window_factor.sigmoid() if isinstance(mixer.combine, SharedNormalizer) else None


def _complement(mixer: Mixer) -> bool:
    return isinstance(mixer.combine, SharedNormalizer) and mixer.combine.config.complement


def _rest(mixer: Mixer) -> Tensor | None:
    share = _share(mixer)
    return 1 - share if _complement(mixer) and share is not None else None
