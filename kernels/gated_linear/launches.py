"""The launches of gated_linear, forward and backward, in order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize.kernels.gated_linear.plan import BLOCK, CHUNK, Plan, config, key_columns
from linearize.kernels.gated_linear.triton_head import (
    decay_gradient_kernel,
    head_gradient_kernel,
    head_output_kernel,
)
from linearize.kernels.gated_linear.triton_key import key_gradient_kernel, key_output_kernel
from linearize.kernels.gated_linear.triton_states import carry_kernel, scan_kernel
from linearize.kernels.launch import launch

Some = tuple[Tensor | None, Tensor | None]
NAMES = ("states", "norms", "carries", "carry_norms", "spans")


def launch_forward(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, docs: Tensor | None, start: Some
) -> list[Tensor]:
    """Key states, their carries, outputs; the result is `Plan.outputs`, filled."""
    outputs = plan.outputs(q)
    out, denominator, *final = outputs[:4]
    *stored, marks = outputs[4:]
    _scan(plan, k, v, None, log_decay, docs, start, stored, final, reverse=False)
    inputs = {"q": q, "k": k, "v": v, "g": log_decay, "docs": docs, "out": out, "denominator": denominator}
    inputs |= dict(zip(NAMES, stored, strict=True))
    kernels: list[tuple[Any, str, dict[str, Any]]]
    kernels = [(head_output_kernel, "head_output", {"HAS_DECAY": plan.decay > 0})]
    if plan.decay == 2:
        kernels = [
            (key_output_kernel, f"key_output_{name}", _levels(plan, marks, name))
            for name in ("whole", "halved")
        ]
    for kernel, name, extra in kernels:
        made = config(name, plan)
        columns = min(made.columns, plan.value_dim)
        launch(
            kernel, (plan.tiles * (plan.value_dim // columns), plan.batch * plan.heads),
            **inputs, **extra, BV=columns, **_geometry(plan), **_flags(plan, docs),
            num_warps=made.warps, num_stages=made.stages,
        )  # fmt: skip
    return outputs


def launch_backward(
    plan: Plan, do: Tensor, weight: Tensor | None, final: Some, q: Tensor, k: Tensor, v: Tensor,
    log_decay: Tensor | None, docs: Tensor | None, stored: list[Tensor], wants_start: bool,
) -> list[Tensor]:  # fmt: skip
    """Query states and their carries, then dq, dk, dv side by side, then the decays."""
    *stored, marks = stored
    ahead = plan.states(q)
    start = plan.state(q)
    _scan(plan, q, do, weight, log_decay, docs, final, ahead, start if wants_start else None, reverse=True)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    dg = q.new_empty(0) if log_decay is None else torch.empty_like(log_decay)
    inputs = {"q": q, "k": k, "v": v, "g": log_decay, "docs": docs, "do": do, "weight": weight}
    inputs |= dict(zip(NAMES, stored, strict=True))
    inputs |= dict(zip(("ahead", *(f"ahead_{name}" for name in NAMES[1:])), ahead, strict=True))
    gradients = {"dq": dq, "dk": dk, "dv": dv}
    if plan.decay == 2:
        for name, sums, products in (("whole", True, True), ("halved", True, False), ("halved", False, True)):
            made = config(f"key_gradient_{name}", plan)
            columns, value_columns = key_columns(plan, name), min(made.columns, plan.value_dim)
            roles = sums * (plan.key_dim // columns) + products * (plan.value_dim // value_columns)
            launch(
                key_gradient_kernel, (plan.tiles * roles, plan.batch * plan.state_heads),
                **inputs, **gradients, dg=dg, BV=value_columns, COLUMNS=columns, SUMS=sums, PRODUCTS=products,
                **_levels(plan, marks, name), **_geometry(plan), **_flags(plan, docs),
                num_warps=made.warps, num_stages=made.stages,
            )  # fmt: skip
    else:
        _head_gradients(plan, inputs, gradients, dg, docs)
    return [dq, dk, dv, dg, *(start if wants_start else [q.new_empty(0), q.new_empty(0)])]


def _head_gradients(
    plan: Plan,
    inputs: dict[str, Tensor | None],
    gradients: dict[str, Tensor],
    dg: Tensor,
    docs: Tensor | None,
) -> None:
    made = config("head_gradient", plan)
    key_columns, value_columns = min(made.columns, plan.key_dim), min(made.columns, plan.value_dim)
    blocks, group = plan.key_dim // key_columns, plan.heads // plan.state_heads
    roles = (group + 1) * blocks + plan.value_dim // value_columns
    q = gradients["dq"]
    rows = (blocks, plan.batch, plan.tokens) if plan.decay else (0,)

    def partial(*size: int) -> Tensor:
        return q.new_empty(*rows, *size, dtype=torch.float32)

    query_products, key_products, crossing = (
        partial(plan.heads),
        partial(plan.state_heads),
        partial(plan.state_heads),
    )
    flow = q.new_empty(*rows[:2], plan.state_heads, plan.periods, dtype=torch.float32)
    launch(
        head_gradient_kernel, (plan.tiles * roles, plan.batch * plan.state_heads),
        **inputs, **gradients, query_products=query_products, key_products=key_products, crossing=crossing, flow=flow,
        BK=key_columns, BV=value_columns, HAS_DECAY=plan.decay > 0, **_geometry(plan), **_flags(plan, docs),
        num_warps=made.warps, num_stages=made.stages,
    )  # fmt: skip
    if plan.decay:
        launch(
            decay_gradient_kernel, (plan.periods, plan.batch * plan.state_heads),
            query_products=query_products, key_products=key_products, crossing=crossing, flow=flow, dg=dg,
            batches=plan.batch, tokens=plan.tokens, periods=plan.periods, heads=plan.heads,
            state_heads=plan.state_heads, BLOCKS=blocks, num_warps=1, num_stages=1, SPAN=plan.tiles_of_period * CHUNK,
            READ_BEFORE=plan.read_before,
        )  # fmt: skip


def _scan(
    plan: Plan, x: Tensor, y: Tensor, weight: Tensor | None, log_decay: Tensor | None, docs: Tensor | None, start: Some,
    stored: list[Tensor], final: list[Tensor] | None, *, reverse: bool,
) -> None:  # fmt: skip
    """States of the periods, and the state at the end of the scan where `final` is given."""
    if not plan.tiles or not plan.batch:
        for given, to in zip(start, final or (), strict=False):
            to.copy_(torch.zeros_like(to) if given is None else given)
        return
    states, norms, carries, carry_norms, spans = stored
    size = (plan.batch, plan.state_heads, plan.segments)
    total_spans = x.new_empty(*size, *spans.shape[3:], dtype=torch.float32)
    totals = final
    if plan.segments > 1:
        totals = [torch.empty_like(carries, dtype=torch.float32), torch.empty_like(carry_norms)]
    made = config("scan", plan)
    columns = min(made.columns, plan.value_dim)
    launch(
        scan_kernel, (plan.value_dim // columns, plan.batch * plan.state_heads * plan.segments),
        x=x, y=y, weight=weight, g=log_decay, docs=docs, start=start[0], start_norm=start[1],
        states=states, norms=norms, spans=spans, totals=None if totals is None else totals[0],
        total_norms=None if totals is None else totals[1], total_spans=total_spans, BV=columns,
        **_geometry(plan) | {"heads": x.shape[2]}, DECAY=plan.decay, REVERSE=reverse, READ_BEFORE=plan.read_before,
        NORMALIZE=plan.normalize, HAS_DOCS=docs is not None, HAS_START=start[0] is not None,
        HAS_TOTALS=totals is not None, PRECISION=plan.precision, num_warps=made.warps, num_stages=made.stages,
    )  # fmt: skip
    if plan.segments == 1 or totals is None:
        return
    for at, (total, carry) in enumerate(zip(totals, (carries, carry_norms), strict=True)):
        if at and not plan.normalize:
            continue
        number = total[0, 0, 0].numel()
        block = min(1024, 1 << (number - 1).bit_length())
        features = plan.key_dim if plan.decay == 2 else 1
        launch(
            carry_kernel, (-(-number // block), plan.batch * plan.state_heads),
            totals=total, spans=total_spans, carries=carry, final=None if final is None else final[at],
            segments=plan.segments, size=number, width=number // features, features=features, REVERSE=reverse,
            HAS_FINAL=final is not None, BLOCK=block, num_warps=4, num_stages=1,
        )  # fmt: skip


def _levels(plan: Plan, marks: Tensor, name: str) -> dict[str, Any]:
    """What the launches for whole and for halved chunks do not share."""
    return {"halved": marks, "HALVED": name == "halved", "BK": min(BLOCK[name], plan.key_dim)}


def _geometry(plan: Plan) -> dict[str, int]:
    return {
        "tokens": plan.tokens,
        "tiles": plan.tiles,
        "periods": plan.periods,
        "per_segment": plan.per_segment,
        "segments": plan.segments,
        "heads": plan.heads,
        "state_heads": plan.state_heads,
        "K": plan.key_dim,
        "V": plan.value_dim,
        "C": CHUNK,
        "TILES": plan.tiles_of_period,
    }


def _flags(plan: Plan, docs: Tensor | None) -> dict[str, bool | str]:
    return {
        "READ_BEFORE": plan.read_before,
        "NORMALIZE": plan.normalize,
        "HAS_DOCS": docs is not None,
        "HAS_CARRY": plan.segments > 1,
        "WIDE": plan.wide,
        "PRECISION": plan.precision,
    }
