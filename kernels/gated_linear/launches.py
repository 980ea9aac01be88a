"""The launches of gated_linear, forward and backward, in order."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.kernels.gated_linear.launches_key import key_gradients, key_outputs
from linearize.kernels.gated_linear.launches_states import flags, geometry, scan
from linearize.kernels.gated_linear.periods import CHUNK, NAMES, Some
from linearize.kernels.gated_linear.plan import Plan, config
from linearize.kernels.gated_linear.triton_head import (
    decay_gradient_kernel,
    head_gradient_kernel,
    head_output_kernel,
)
from linearize.kernels.launch import launch


def launch_forward(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, bonus: Tensor | None, docs: Tensor | None,
    start: Some,
) -> list[Tensor]:  # fmt: skip
    """Key states, their carries, outputs; the result is `Plan.outputs`, filled."""
    outputs = plan.outputs(q)
    out, denominator, *final = outputs[:4]
    *stored, marks = outputs[4:]
    scan(plan, k, v, None, log_decay, docs, start, stored, final, reverse=False)
    if plan.decay == 2:
        assert log_decay is not None
        key_outputs(plan, q, k, v, log_decay, bonus, docs, stored, marks, out, denominator)
        return outputs
    made = config("head_output", plan)
    columns = min(made.columns, plan.value_dim)
    launch(
        head_output_kernel, (plan.tiles * (plan.value_dim // columns), plan.batch * plan.heads),
        q=q, k=k, v=v, g=log_decay, docs=docs, out=out, denominator=denominator,
        **dict(zip(NAMES, stored, strict=True)), HAS_DECAY=plan.decay > 0, BV=columns, **geometry(plan),
        **flags(plan, docs), num_warps=made.warps, num_stages=made.stages,
    )  # fmt: skip
    return outputs


def launch_backward(
    plan: Plan, do: Tensor, weight: Tensor | None, final: Some, q: Tensor, k: Tensor, v: Tensor,
    log_decay: Tensor | None, bonus: Tensor | None, docs: Tensor | None, stored: list[Tensor], wants_start: bool,
) -> list[Tensor]:  # fmt: skip
    """Query states and their carries, then dq, dk, dv side by side, then the decays."""
    *stored, marks = stored
    ahead = plan.states(q)
    start = plan.state(q)
    scan(plan, q, do, weight, log_decay, docs, final, ahead, start if wants_start else None, reverse=True)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    dg = q.new_empty(0) if log_decay is None else torch.empty_like(log_decay)
    du = None
    if plan.decay == 2:
        assert log_decay is not None
        du = key_gradients(
            plan, q, k, v, log_decay, bonus, docs, do, weight, stored, marks, ahead, dq, dk, dv, dg
        )
    else:
        inputs = {"q": q, "k": k, "v": v, "g": log_decay, "docs": docs, "do": do, "weight": weight}
        inputs |= dict(zip(NAMES, stored, strict=True))
        inputs |= dict(zip(("ahead", *(f"ahead_{name}" for name in NAMES[1:])), ahead, strict=True))
        _head_gradients(plan, inputs, {"dq": dq, "dk": dk, "dv": dv}, dg, docs)
    du = q.new_empty(0, dtype=torch.float32) if du is None else du
    return [dq, dk, dv, dg, du, *(start if wants_start else [q.new_empty(0), q.new_empty(0)])]


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
        BK=key_columns, BV=value_columns, HAS_DECAY=plan.decay > 0, **geometry(plan), **flags(plan, docs),
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
