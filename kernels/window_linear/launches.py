"""The launches of window_linear, forward and backward, in order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize.kernels.launch import launch, processors
from linearize.kernels.window_linear.plan import Plan, config
from linearize.kernels.window_linear.sizes import CHUNK, MOST_PINS
from linearize.kernels.window_linear.triton_aligned_backward import aligned_query_gradient_kernel
from linearize.kernels.window_linear.triton_aligned_forward import aligned_output_kernel
from linearize.kernels.window_linear.triton_aligned_keys import aligned_key_gradient_kernel
from linearize.kernels.window_linear.triton_backward import key_gradient_kernel, query_gradient_kernel
from linearize.kernels.window_linear.triton_common import LOG2E
from linearize.kernels.window_linear.triton_forward import output_kernel
from linearize.kernels.window_linear.triton_maps import map_gradient_kernel
from linearize.kernels.window_linear.triton_pins import pinned_parts_kernel, pinned_whole_kernel
from linearize.kernels.window_linear.triton_states import carry_kernel, key_states_kernel, query_states_kernel

Some = tuple[Tensor | None, ...]
Pinned = tuple[Tensor | None, Tensor | None, Tensor]
"""Where the pinned keys of each query's document begin, codes as the past sees them, what pinned keys are asked."""


def launch_forward(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: tuple[Tensor, Tensor],
    factors: Some,
    masks: Some,
    carried: Some,
    pinned: Pinned,
) -> list[Tensor]:
    """Key states, their carries, outputs; the result is `Plan.outputs`, filled."""
    outputs = plan.outputs(q)
    out, maximum, log_inverse, final, final_norm, *rest = outputs
    states, norms, carries, carry_norms, query_lse, key_lse = rest
    query_map, key_map = maps
    weight, factor, sink = factors
    codes, reach = masks
    pin, past_codes, asking = pinned
    start, start_norm = carried
    totals, total_norms = final, final_norm
    if plan.segments > 1:
        totals = torch.empty_like(carries, dtype=torch.float32)
        total_norms = torch.empty_like(carry_norms)
    if not plan.chunks:
        final.copy_(torch.zeros_like(final) if start is None else start)
        final_norm.copy_(torch.zeros_like(final_norm) if start_norm is None else start_norm)
    made = config("key_states", plan)
    launch(
        key_states_kernel,
        (plan.scans(made), plan.batch * plan.state_heads * plan.segments * (plan.chunks > 0)),
        k=k, v=v, weight=key_map, codes=past_codes, reach=reach, start=start, start_norm=start_norm,
        states=states, norms=norms, totals=totals, total_norms=total_norms, key_lse=key_lse,
        key_tokens=plan.key_tokens, tokens=plan.tokens, base=plan.base, chunks=plan.chunks,
        per_segment=plan.per_segment, limit=plan.key_tokens - plan.window,
        last_tile=plan.last_tile if plan.return_state else plan.chunks, segments=plan.segments,
        kv_heads=plan.kv_heads, state_heads=plan.state_heads, BV=made.values, SPLIT=plan.split, **_sizes(plan),
        HAS_CODES=codes is not None, HAS_REACH=reach is not None, HAS_START=start is not None,
        HAS_TOTALS=plan.return_state or plan.segments > 1, IS_FINAL=plan.segments == 1, PRECISION=plan.precision,
        **made.options(),
    )  # fmt: skip
    if plan.segments > 1:
        for total, carry, last in ((totals, carries, final), (total_norms, carry_norms, final_norm)):
            _carry(plan, total, carry, last if plan.return_state else None, codes, reverse=False)
    shared = {
        "q": q, "k": k, "v": v, "query_map": query_map, "key_map": key_map, "weight": weight, "factor": factor,
        "sink": sink, "codes": codes, "past_codes": past_codes, "pin": pin, "asking": asking,
        "states": states, "norms": norms, "carries": carries, "carry_norms": carry_norms,
        "out": out, "maximum": maximum, "log_inverse": log_inverse, "query_lse": query_lse,
        "HAS_SINK": sink is not None, "PINS": plan.pins,
    }  # fmt: skip
    aligned = plan.whole_chunks and reach is None
    made = config(plan.kernel("output", aligned=aligned), plan)
    grid = (plan.chunks * (plan.value_dim // made.values), plan.batch * plan.heads)
    options = {"BV": made.values, **made.options()}
    if aligned:
        launch(
            aligned_output_kernel, grid, key_lse=key_lse, **shared, **_aligned(plan, factor, codes), **options
        )
    else:
        launch(output_kernel, grid, reach=reach, **shared, **_general(plan, factor, codes, reach), **options)
    return outputs


def launch_backward(
    plan: Plan, do: Tensor, q: Tensor, k: Tensor, v: Tensor, maps: tuple[Tensor, Tensor], factors: Some, masks: Some,
    pinned: Pinned, saved: list[Tensor], train_maps: bool, train_inputs: bool,
) -> list[Tensor]:  # fmt: skip
    """Queries' side, query states and their carries, keys' side, pinned keys, maps.

    Without `train_inputs` the gradients of q, k, v and what pinned keys are asked hold nothing.
    """
    out, maximum, log_inverse, states, norms, carries, carry_norms, query_lse, key_lse = saved
    query_map, key_map = maps
    weight, factor, sink = factors
    codes, reach = masks
    pin, past_codes, asking = pinned
    dq = torch.empty_like(q)
    # no tile holds the keys in front of tile 0
    empty = torch.zeros_like if plan.base > 0 else torch.empty_like
    dk, dv = (empty(x) for x in (k, v))
    dasking = q.new_empty(0) if asking is q else torch.empty_like(q)
    pin_weights, pin_ds = (
        q.new_empty(plan.batch, plan.heads, plan.pins, plan.tokens, dtype=torch.float32) for _ in range(2)
    )
    rows = (plan.batch, plan.heads, plan.tokens)
    delta, balance, share_gradient, dsink = (q.new_empty(rows, dtype=torch.float32) for _ in range(4))
    place_of_top = q.new_empty(rows, dtype=torch.int32)
    query_dy = q.new_empty(plan.batch, plan.tokens, plan.heads, plan.map_dim) if train_maps else None
    key_dy = q.new_empty(plan.batch, plan.key_tokens, plan.heads, plan.map_dim) if train_maps else None
    if key_dy is not None and plan.base > 0:
        key_dy[:, : plan.base].zero_()
    aligned = plan.whole_chunks and reach is None
    shared: dict[str, Any] = {
        "q": q, "k": k, "v": v, "do": do, "query_map": query_map, "key_map": key_map, "weight": weight,
        "factor": factor, "codes": codes, "past_codes": past_codes, "maximum": maximum, "log_inverse": log_inverse,
        "delta": delta, "balance": balance, "place_of_top": place_of_top, "TRAIN_MAPS": train_maps,
    }  # fmt: skip
    if aligned:
        shared |= _aligned(plan, factor, codes) | {
            "query_lse": query_lse,
            "key_lse": key_lse,
            "INPUTS": train_inputs,
        }
    else:
        shared |= _general(plan, factor, codes, reach) | {"reach": reach}
    made = config(plan.kernel("query_gradient", aligned=aligned), plan)
    launch(
        aligned_query_gradient_kernel if aligned else query_gradient_kernel, (plan.chunks, plan.batch * plan.heads),
        out=out, sink=sink, states=states, norms=norms, carries=carries, carry_norms=carry_norms, dq=dq, dy=query_dy,
        share_gradient=share_gradient, dsink=dsink, HAS_SINK=sink is not None, pin=pin, asking=asking,
        dasking=dasking, pin_weights=pin_weights, pin_ds=pin_ds, PINS=plan.pins, HAS_ASKING=asking is not q, **shared,
        **made.options(),
    )  # fmt: skip
    states, norms, carries, carry_norms = _query_states(
        plan, shared, query_lse, (states, norms, carries, carry_norms)
    )
    shared |= {
        "states": states, "norms": norms, "carries": carries, "carry_norms": carry_norms, "first": plan.first_tile,
        "dy": key_dy,
    }  # fmt: skip
    if aligned:
        _aligned_keys(plan, dk, dv, shared, train_inputs)
    else:
        _general_keys(plan, dk, dv, shared, train_inputs)
    if plan.pins and plan.chunks and train_inputs:
        _pinned_gradient(plan, asking, do, (pin, codes), (pin_weights, pin_ds, balance, place_of_top), dk, dv)
    found = [x.zero_() for x in plan.gradients(q, train_maps)]
    if query_dy is not None and key_dy is not None:
        found[0] = _map_gradient(plan, q, query_dy)
        per_head = _map_gradient(plan, k, key_dy)
        found[1] = per_head.unflatten(0, (plan.state_heads, -1)).sum(1)
    if plan.window:
        sums = share_gradient.sum((0, 2))
        found[2] = found[2] if weight is None else sums / weight
        found[3] = found[3] if factor is None else -sums / factor
    if sink is not None:
        found[4] = dsink.sum((0, 2))
    return [dq, dk, dv, dasking, *found]


def _query_states(
    plan: Plan, shared: dict[str, Any], query_lse: Tensor, kept: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Sums over the queries behind each tile, and their carries, shaped as those `kept` of the keys before it."""
    given = {name: shared[name] for name in ("q", "do", "log_inverse", "delta", "factor", "codes")}
    states, norms, carries, carry_norms = (torch.empty_like(x) for x in kept)
    totals, total_norms = torch.empty_like(carries, dtype=torch.float32), torch.empty_like(carry_norms)
    made = config("split_query_states" if plan.split else "query_states", plan)
    launch(
        query_states_kernel,
        (plan.scans(made), plan.batch * plan.state_heads * plan.segments * (plan.chunks > 0)),
        **given, weight=shared["query_map"], query_lse=query_lse, states=states, norms=norms, totals=totals,
        total_norms=total_norms,
        key_tokens=plan.key_tokens, tokens=plan.tokens, prefix=plan.prefix, chunks=plan.chunks,
        per_segment=plan.per_segment, segments=plan.segments,
        heads=plan.heads, state_heads=plan.state_heads, BV=made.values, SPLIT=plan.split, **_sizes(plan),
        HAS_FACTOR=given["factor"] is not None, HAS_CODES=given["codes"] is not None, HAS_TOTALS=plan.segments > 1,
        PRECISION=plan.precision, **made.options(),
    )  # fmt: skip
    if plan.segments > 1:
        for total, carry in ((totals, carries), (total_norms, carry_norms)):
            _carry(plan, total, carry, None, given["codes"], reverse=True)
    return states, norms, carries, carry_norms


def _aligned_keys(plan: Plan, dk: Tensor, dv: Tensor, shared: dict[str, Any], train_inputs: bool) -> None:
    """dk and dv, where windows are whole tiles: one launch."""
    frozen = plan.window > 0 and not train_inputs
    name = "frozen_key_gradient" if frozen else plan.kernel("key_gradient", aligned=True)
    launch(
        aligned_key_gradient_kernel, _key_grid(plan), dk=dk, dv=dv, **shared, **config(name, plan).options()
    )


def _general_keys(plan: Plan, dk: Tensor, dv: Tensor, shared: dict[str, Any], train_inputs: bool) -> None:
    """dk and dv of any window; wide heads take the window's part and the sums' one after the other, in float32."""
    # the window has a part in dk and dv alone
    windowed = plan.window > 0 and train_inputs
    split = windowed and plan.value_dim * plan.key_dim > 64 * 64
    parts = [(True, False, False), (False, True, True)] if split else [(windowed, True, False)]
    # no tile holds the keys in front of tile 0
    empty = torch.zeros_like if plan.base > 0 else torch.empty_like
    for_k, for_v = (empty(x, dtype=torch.float32) for x in (dk, dv)) if split else (dk, dv)
    options = config(plan.kernel("key_gradient", aligned=False), plan).options()
    for do_window, do_linear, add in parts:
        launch(
            key_gradient_kernel, _key_grid(plan), dk=for_k, dv=for_v, **shared, DO_WINDOW=do_window,
            DO_LINEAR=do_linear, ADD=add, **options,
        )  # fmt: skip
    if split:
        dk.copy_(for_k)
        dv.copy_(for_v)


def _key_grid(plan: Plan) -> tuple[int, int]:
    return plan.chunks + plan.lag - plan.first_tile, plan.batch * plan.kv_heads


def _pinned_gradient(
    plan: Plan, asking: Tensor, do: Tensor, masks: Some, rows: tuple[Tensor, ...], dk: Tensor, dv: Tensor
) -> None:
    """Add to dk and dv what pinned keys get of the queries behind whose windows they are."""
    pin, codes = masks
    pin_weights, pin_ds, balance, place_of_top = rows
    size = (plan.batch, plan.kv_heads, 2, plan.pin_segments, MOST_PINS)
    parts_k, parts_v = (
        dk.new_empty(*size, width, dtype=torch.float32) for width in (plan.key_dim, plan.value_dim)
    )
    shared: dict[str, Any] = {
        "pin": pin, "codes": codes, "parts_k": parts_k, "parts_v": parts_v, "dk": dk, "dv": dv, "tokens": plan.tokens,
        "key_tokens": plan.key_tokens, "prefix": plan.prefix, "segments": plan.pin_segments,
        "kv_heads": plan.kv_heads, "K": plan.key_dim, "V": plan.value_dim, "PINS": plan.pins, "PP": MOST_PINS,
        "SEGMENT": plan.pin_segment,
    }  # fmt: skip
    rows_of = plan.batch * plan.kv_heads
    launch(
        pinned_parts_kernel, (plan.pin_segments, rows_of),
        asking=asking, do=do, pin_weights=pin_weights, pin_ds=pin_ds, balance=balance, place_of_top=place_of_top,
        scale=plan.scaling, heads=plan.heads, C=CHUNK, PRECISION=plan.precision, **shared,
        **config("pinned_parts", plan).options(),
    )  # fmt: skip
    launch(pinned_whole_kernel, (plan.pin_segments + 1, rows_of), num_warps=4, num_stages=1, **shared)


def _carry(
    plan: Plan, totals: Tensor, carries: Tensor, final: Tensor | None, codes: Tensor | None, *, reverse: bool
) -> None:
    size = totals[0, 0, 0].numel()
    values = plan.value_dim if totals.dim() == 6 else 1
    block = min(1024, 1 << (size - 1).bit_length())
    launch(
        carry_kernel, (-(-size // block), plan.batch * plan.state_heads),
        totals=totals, carries=carries, final=final, codes=codes, key_tokens=plan.key_tokens,
        origin=plan.prefix if reverse else plan.base, span=plan.per_segment * CHUNK, segments=plan.segments,
        state_heads=plan.state_heads, size=size, REVERSE=reverse, HAS_CODES=codes is not None,
        HAS_FINAL=final is not None, V=values, F=plan.map_dim, BLOCK=block, num_warps=4, num_stages=1,
    )  # fmt: skip


def _map_gradient(plan: Plan, x: Tensor, dy: Tensor) -> Tensor:
    """sum over tokens of x^T dy, [H, K, f] float32; shares of the tokens side by side, added in a fixed order."""
    count = x.shape[0] * x.shape[1]
    splits = max(1, min(2 * processors(x.device) // plan.heads, count // 256))
    per_split = -(-count // splits // CHUNK) * CHUNK
    splits = -(-count // per_split)
    parts = x.new_empty(splits, plan.heads, plan.key_dim, plan.map_dim, dtype=torch.float32)
    made = config("map_gradient", plan)
    launch(
        map_gradient_kernel, (splits, plan.heads),
        x=x, dy=dy, out=parts, count=count, per_split=per_split, splits=splits,
        x_heads=x.shape[2], heads=plan.heads, K=plan.key_dim, F=plan.map_dim, C=CHUNK, PRECISION=plan.precision,
        **made.options(),
    )  # fmt: skip
    return parts.sum(0)


def _sizes(plan: Plan) -> dict[str, int]:
    return {"K": plan.key_dim, "V": plan.value_dim, "F": plan.map_dim, "C": CHUNK}


def _geometry(plan: Plan, factor: Tensor | None, codes: Tensor | None) -> dict[str, int | float | bool | str]:
    return {
        "tokens": plan.tokens,
        "key_tokens": plan.key_tokens,
        "prefix": plan.prefix,
        "base": plan.base,
        "chunks": plan.chunks,
        "per_segment": plan.per_segment,
        "segments": plan.segments,
        "heads": plan.heads,
        "kv_heads": plan.kv_heads,
        "state_heads": plan.state_heads,
        "HAS_FACTOR": factor is not None,
        "HAS_CODES": codes is not None,
        "HAS_CARRY": plan.segments > 1,
        "WIDE": plan.wide,
        "PRECISION": plan.precision,
        **_sizes(plan),
    }


def _aligned(plan: Plan, factor: Tensor | None, codes: Tensor | None) -> dict[str, int | float | bool | str]:
    return {"scale": plan.scaling * LOG2E.value, "LAG": plan.lag} | _geometry(plan, factor, codes)


def _general(
    plan: Plan, factor: Tensor | None, codes: Tensor | None, reach: Tensor | None
) -> dict[str, int | float | bool | str]:
    return {
        "scale": plan.scaling,
        "window": plan.window,
        "TILES": plan.lag + 1,
        "LINEAR_TILES": plan.linear_tiles,
        "HAS_WINDOW": plan.window > 0,
        "HAS_REACH": reach is not None,
    } | _geometry(plan, factor, codes)
