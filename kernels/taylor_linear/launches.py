"""The launches of taylor_linear, forward and backward, in order."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from linearize.kernels.gated_linear.launches_states import Pieces, nothing
from linearize.kernels.gated_linear.periods import NAMES, Some
from linearize.kernels.launch import launch
from linearize.kernels.taylor_linear.plan import TILES, Plan, config
from linearize.kernels.taylor_linear.triton_products import product_kernel
from linearize.kernels.taylor_linear.triton_states import scan_kernel
from linearize.kernels.taylor_linear.triton_values import value_kernel


def launch_forward(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, codes: Tensor | None, start: Some
) -> list[Tensor]:
    """Key states, their carries, outputs; the result is `Plan.outputs`, filled."""
    outputs = plan.outputs(q)
    out, denominator, *final = outputs[:4]
    stored = outputs[4:]
    _scan(plan, k, v, None, codes, start, stored, final, reverse=False)
    _values(plan, q, k, v, codes, stored, out, denominator, causal=True)
    return outputs


def launch_backward(
    plan: Plan, do: Tensor, weight: Tensor | None, final: Some, q: Tensor, k: Tensor, v: Tensor, codes: Tensor | None,
    stored: list[Tensor], wants_start: bool,
) -> list[Tensor]:  # fmt: skip
    """Query states and their carries, then dq, dk, dv (a part for each head of the state), then the carried state's."""
    ahead = plan.states(q)
    start = plan.state(q)
    _scan(plan, q, do, weight, codes, final, ahead, start if wants_start else None, reverse=True)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    dv = v.new_empty(*k.shape[:3], plan.value_dim)
    inputs = {"q": q, "k": k, "v": v, "do": do, "weight": weight}
    _products(plan, inputs, codes, stored, dq, causal=True)
    _products(plan, inputs, codes, ahead, dk, causal=False)
    _values(plan, k, q, do, codes, ahead, dv, None, causal=False)
    return [dq, dk, dv, *(start if wants_start else [q.new_empty(0), q.new_empty(0)])]


def _values(
    plan: Plan, a: Tensor, b: Tensor, c: Tensor, codes: Tensor | None, stored: list[Tensor], out: Tensor,
    denominator: Tensor | None, *, causal: bool,
) -> None:  # fmt: skip
    made = config("value", plan)
    launch(
        value_kernel, (plan.tiles * (plan.value_dim // made.values), plan.batch * a.shape[2]),
        a=a, b=b, c=c, codes=codes, out=out, denominator=denominator, **dict(zip(NAMES, stored, strict=True)),
        CAUSAL=causal, BF=made.features, BV=made.values, **_sizes(plan, codes), num_warps=made.warps,
        num_stages=made.stages,
    )  # fmt: skip


def _products(
    plan: Plan, inputs: dict[str, Tensor | None], codes: Tensor | None, stored: list[Tensor], out: Tensor, *,
    causal: bool,
) -> None:  # fmt: skip
    made = config("product", plan)
    launch(
        product_kernel, (plan.tiles, plan.batch * out.shape[2]),
        **inputs, codes=codes, out=out, **dict(zip(NAMES, stored, strict=True)), CAUSAL=causal, BF=made.features,
        BV=made.values, **_sizes(plan, codes), num_warps=made.warps, num_stages=made.stages,
    )  # fmt: skip


def _sizes(plan: Plan, codes: Tensor | None) -> dict[str, Any]:
    """Sizes and choices that the kernels behind the scan take."""
    return _geometry(plan) | {
        "scale": plan.scale,
        "heads": plan.heads,
        "state_heads": plan.state_heads,
        "value_heads": plan.value_heads,
        "DP": max(16, plan.dim),
        "HAS_CODES": codes is not None,
        "HAS_CARRY": plan.segments > 1,
    }


def _geometry(plan: Plan) -> dict[str, Any]:
    return plan.geometry() | {
        "root": math.sqrt(plan.scale),
        "D": plan.dim,
        "F": plan.width,
        "TILES": TILES,
        "NORMALIZE": plan.normalize,
        "WIDE": plan.wide,
        "PRECISION": plan.precision,
    }


def _scan(
    plan: Plan, x: Tensor, y: Tensor, weight: Tensor | None, codes: Tensor | None, start: Some, stored: list[Tensor],
    final: list[Tensor] | None, *, reverse: bool,
) -> None:  # fmt: skip
    """States of the periods, and the state at the end of the scan where `final` is given."""
    if nothing(plan, start, final):
        return
    pieces = Pieces.of(plan, x, stored, final)
    made = config("scan", plan)
    blocks = -(-plan.width // made.features) * (plan.value_dim // made.values)
    launch(
        scan_kernel, (blocks, plan.batch * plan.state_heads * plan.segments),
        x=x, y=y, weight=weight, codes=codes, start=start[0], start_norm=start[1], **pieces.arguments(stored),
        x_heads=x.shape[2], y_heads=y.shape[2], state_heads=plan.state_heads, BF=made.features, BV=made.values,
        **_geometry(plan), REVERSE=reverse, HAS_CODES=codes is not None, HAS_START=start[0] is not None,
        num_warps=made.warps, num_stages=made.stages,
    )  # fmt: skip
    pieces.carry(plan, stored, final, reverse=reverse)
