"""Window softmax and learned linear attention under one normalizer, in O(T) memory: the operator of a LoLCATs layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.linear import linear_chunk
from linearize.kernels.window.reference import Weighted, softmax_scores, window_reference
from linearize.kernels.window_linear.reference import (
    Layer,
    Pins,
    Weights,
    blended,
    divide,
    document,
    hedgehog,
)

State = tuple[Tensor, Tensor]
"""Sums [B, M, 2 f, V] and norms [B, M, 2 f], float32 or wider."""


def window_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    *,
    window: int,
    scaling: float,
    window_weight: Tensor | None = None,
    linear_weight: Tensor | None = None,
    sink: Tensor | None = None,
    codes: Tensor | None = None,
    reach: Tensor | None = None,
    least: int | None = None,
    prefix: int = 0,
    state: State | None = None,
    return_state: bool = False,
    pins: Pins | None = None,
) -> tuple[Tensor, State | None]:
    """o_t = sum_j w_tj v_j / sum_j w_tj over the keys j <= t of the query's own document.

    The last `window` keys have w = b exp(scaling q.k - m), m the largest of these scores, and a sink adds b exp(sink -
    m) to the sum of weights. Every older key has w = a phi(q).phi(k) with Hedgehog's phi(x) = [softmax(x W), softmax(-x
    W)] (LoLCATs, Zhang et al. 2024, arXiv 2410.10254, eq. 7, app. A). What is decided here:

    - The past is not divided by exp(m): m is part of LoLCATs' function, which is therefore not invariant to a shift of
      the scores. Nothing overflows, since the largest weight of the window is b and phi.phi lies in (0, 2].
    - The gradient goes through m, as in LoLCATs: dropping it changes dq and dk by half of their size.
    - Norms and carried states are float32; in Triton the states between chunks of bfloat16 inputs are bfloat16, and
      norms are sums of features as rounded as those that entered the states. Features below 1e-12 are not raised to it
      as the module form does.
    - Triton: states between chunks of 64 are one kernel, each chunk's output another; backward mirrors them (states of
      the queries ahead, one kernel for dq, one for dk and dv). Where rows and heads are few, a scan has one half
      of the features, and where they are fewer still it is cut into segments. Nothing is repeated for grouped heads,
      and no document boundary is read back to the host.
    - Pinned keys behind a query's window have the window's weights and enter its maximum; in Triton each row gathers
      its own, whose products are sums over registers, and two kernels add up what they get of later queries.

    Args:
        q: [B, T, H, K].
        k, v: [B, P + T, N, K or V], N dividing H; P = `prefix` keys come before the first query (a carried window).
        query_map, key_map: W, [H, K, f] and [M, K, f], M = H or N.
        window: tokens that the softmax sees, the own included; 0 for linear attention alone (no `window_weight`).
        scaling: factor on q.k in the window.
        window_weight, linear_weight: b and a, [H]; one by default.
        sink: [H].
        codes: [B, P + T] int32, document number d of each token, non-decreasing along a row, or -1 - d where it is
            padding, which no query sees. Carried keys and a carried state belong to document 0. None: one document.
        reach: [B, T] int32, tokens that each query's window sees, `least` to `window`; `window` by default.
        prefix: P, at most `window` and, in front of it, what carries the pinned keys.
        state: carried sums and norms of everything before the prefix; takes no gradient.
        return_state: also give the state behind the last query: every key of its document that no softmax sees again.
        pins: keys that the softmax never loses, see `Pins`; wants `codes`.

    Returns:
        o [B, T, H, V] in the dtype of v, and the new state or None.

    Raises:
        KernelError: Triton is to run what it does not cover. What a device has no shared memory for runs in torch,
            unless Triton was asked for.
    """
    least = window if least is None else least
    assert pins is not None or prefix <= window, "a prefix longer than the window"
    assert prefix >= 0 and least <= window and (pins is None or (codes is not None and window))
    layer = Layer(window, least, scaling, prefix)
    weights = Weights(query_map, key_map, window_weight, linear_weight, sink)
    if dispatch.use_triton(q, k, v):
        from linearize.kernels.window_linear.operator import room, window_linear_triton

        if not dispatch.automatic() or room(q, k, v, weights)[0]:
            return window_linear_triton(q, k, v, weights, layer, codes, reach, state, return_state, pins=pins)
    return _torch(q, k, v, weights, layer, codes, reach, state, return_state, pins)


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Weights,
    layer: Layer,
    codes: Tensor | None,
    reach: Tensor | None,
    state: State | None,
    return_state: bool,
    pins: Pins | None = None,
    chunk: int = 64,
) -> tuple[Tensor, State | None]:
    """Blocks of queries against the keys of their window, and what is behind it by lagged linear attention."""
    batch, tokens, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    dtype, (q, k, v) = v.dtype, (x.to(wide) for x in (q, k, v))
    if codes is None:
        codes = torch.zeros(batch, k.shape[1], dtype=torch.int32, device=q.device)
    if reach is None:
        reach = torch.full((batch, tokens), layer.window, dtype=torch.int32, device=q.device)
    pinned = None if pins is None else _pinned(q, k, v, layer, codes, reach, pins)
    past_codes = codes if pins is None else pins.past
    span = layer.window
    # `span` keys in front of the first query; those that were not carried belong to nobody
    missing = max(span - layer.prefix, 0)
    k, v = (F.pad(x, (0, 0, 0, 0, missing, 0)) for x in (k, v))
    codes, past_codes = (F.pad(x, (missing, 0), value=-1) for x in (codes, past_codes))
    more = k.shape[1] - span - tokens
    k, v, codes, past_codes = k[:, more:], v[:, more:], codes[:, more:], past_codes[:, more:]
    chunk = max(1, min(chunk, tokens))
    extra = -tokens % chunk
    blocks = (tokens + extra) // chunk
    q_cut = F.pad(q, (0, 0, 0, 0, 0, extra)).unflatten(1, (blocks, chunk))
    k_cut, v_cut = (
        F.pad(x, (0, 0, 0, 0, 0, extra)).unfold(1, span + chunk, chunk).movedim(-1, 2) for x in (k, v)
    )
    code_cut = F.pad(codes, (0, extra), value=-1).unfold(1, span + chunk, chunk)
    past_cut = F.pad(past_codes, (0, extra), value=-1).unfold(1, span + chunk, chunk)
    reach_cut = F.pad(reach, (0, extra)).unflatten(1, (blocks, chunk))
    owner = document(code_cut[:, :, span:])
    order = torch.arange(span + chunk, device=q.device)
    age = order[span:, None] - order
    near, far = (
        mask & (age >= 0) & (seen[:, :, None] == owner[..., None])
        for mask, seen in ((age < reach_cut[..., None], code_cut), (age >= reach_cut[..., None], past_cut))
    )
    scores = softmax_scores(q_cut, k_cut, layer.scaling, None)
    phi_q, phi_k = hedgehog(q, weights.query_map), hedgehog(k, weights.key_map)
    state_heads = phi_k.shape[2]
    if state is None:
        size = (batch, state_heads, phi_k.shape[-1])
        state = (phi_k.new_zeros(*size, v.shape[-1]), phi_k.new_zeros(size))
    # every key that has been the window's oldest once is behind all later queries
    value_of = v if state_heads == v.shape[2] else v.repeat_interleave(state_heads // v.shape[2], 2)
    docs = document(codes[:, span:]).to(torch.int64)
    behind = phi_k[:, :tokens] * (past_codes[:, :tokens] == docs)[..., None, None].to(wide)
    far_far = far & (age < span)
    phi_q_cut = F.pad(phi_q, (0, 0, 0, 0, 0, extra)).unflatten(1, (blocks, chunk))
    phi_k_cut = F.pad(phi_k, (0, 0, 0, 0, 0, extra)).unfold(1, span + chunk, chunk).movedim(-1, 2)
    grouped = phi_k_cut.repeat_interleave(heads // state_heads, 3)
    products = torch.einsum("bcthf,bcshf->bchts", phi_q_cut, grouped)
    if pinned is not None:
        whole = (F.pad(x, (0, 0) * (x.dim() - 2) + (0, extra)) for x in pinned)
        numerator, denominator, top = (x.unflatten(1, (blocks, chunk)) for x in whole)
        pinned = (numerator, denominator, top)
    numerator, denominator = blended(
        scores, products, near[:, :, None], far_far[:, :, None], v_cut, weights, pinned
    )
    numerator, denominator = (x.flatten(1, 2)[:, :tokens] for x in (numerator, denominator))
    reader = phi_q if weights.linear_weight is None else phi_q * weights.linear_weight.to(wide)[:, None]
    past, past_sum, state = linear_chunk(reader, behind, value_of[:, :tokens], docs, state, chunk=chunk)
    out = divide(numerator + past, denominator + past_sum).to(dtype)
    if not return_state:
        return out, None
    # keys that only the longest window could see, but the last query's does not
    last_codes, last_doc = past_codes[:, tokens:], docs[:, -1:]
    place = torch.arange(span, device=q.device)
    left = (span - place > reach[:, -1:]) & (last_codes == last_doc)
    added = phi_k[:, tokens:] * left[..., None, None].to(wide)
    sums = state[0] + torch.einsum("bsmf,bsmv->bmfv", added, value_of[:, tokens:])
    return out, (sums, state[1] + added.sum(1))


def _pinned(
    q: Tensor, k: Tensor, v: Tensor, layer: Layer, codes: Tensor, reach: Tensor, pins: Pins
) -> Weighted:
    """The softmax of every query over the pinned keys behind its window, see `window.merge`."""
    tokens = q.shape[1]
    own = layer.prefix + torch.arange(tokens, device=q.device)
    place = pins.place[..., None].to(torch.int64) + torch.arange(pins.count, device=q.device)
    last = (own - reach)[..., None]
    seen = (place >= 0) & (place <= last)
    place = place.clamp(0, k.shape[1] - 1)
    rows = torch.arange(q.shape[0], device=q.device)[:, None, None]
    seen = seen & (codes[rows, place] == document(codes[:, layer.prefix :])[..., None])
    asking = q if pins.asking is None else pins.asking.to(q.dtype)
    # one query and its keys at a time, side by side in front
    partial = window_reference(
        asking.flatten(0, 1)[:, None], k[rows, place].flatten(0, 1), v[rows, place].flatten(0, 1),
        seen.flatten(0, 1)[:, None], scaling=layer.scaling,
    )  # fmt: skip
    numerator, denominator, top = (x[:, 0].unflatten(0, q.shape[:2]) for x in partial)
    return numerator, denominator, top
