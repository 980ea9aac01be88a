"""The launches of gated_delta with a decay for every key dimension, forward and backward, in order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize.kernels.gated_delta.key_plan import key_config, key_outputs, key_pairs
from linearize.kernels.gated_delta.launches import launch_states
from linearize.kernels.gated_delta.plan import CHUNK, Plan, Six, gradients
from linearize.kernels.gated_delta.triton_key_backward import key_change_kernel, key_reader_kernel
from linearize.kernels.gated_delta.triton_key_forward import (
    key_inverse_kernel,
    key_output_kernel,
    key_pairs_kernel,
    key_transition_kernel,
)
from linearize.kernels.gated_delta.triton_key_gradient import key_sums_kernel
from linearize.kernels.launch import launch


def launch_key_forward(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, docs: Tensor, start: Tensor
) -> list[Tensor]:
    """Pairs, inverses, what each chunk does to the state, states, outputs; the result is `key_outputs`, filled."""
    out, final, inverse, weights, kept, removal, states, halved = made = key_outputs(plan, q)
    if not plan.tokens:
        final.copy_(start)
        return made
    gates = {"beta": beta, "log_decay": log_decay, "docs": docs}
    rows = plan.batch * plan.state_heads
    pairs = key_pairs(plan, q)
    made_for = key_config("pairs", plan)
    for halves in (False, True):
        launch(
            key_pairs_kernel, (rows * plan.chunks,), q=q, k=k, halved=halved, pairs=pairs, weights=weights,
            heads=plan.heads, **gates, **_sizes(plan), BK=made_for.keys, C=CHUNK, HALVED=halves,
            WIDE=_wide(q), PRECISION=plan.precision, num_warps=made_for.warps, num_stages=made_for.stages,
        )  # fmt: skip
    launch(
        key_inverse_kernel, (rows * plan.chunks,), pairs=pairs, inverse=inverse, PRECISION=plan.precision,
        num_warps=1, num_stages=1,
    )  # fmt: skip
    made_for = key_config("transition", plan)
    launch(
        key_transition_kernel, (rows * plan.chunks,), k=k, v=v, inverse=inverse, removal=removal, states=states,
        kept=kept, **gates, **_sizes(plan), **_columns(plan), BK=made_for.keys, BV=made_for.values,
        num_warps=made_for.warps, num_stages=made_for.stages,
    )  # fmt: skip
    launch_states(plan, removal, kept, start, states, final, reverse=False)
    made_for = key_config("output", plan)
    launch(
        key_output_kernel, (rows * plan.chunks * (plan.value_dim // made_for.values),), q=q, k=k, v=v, inverse=inverse,
        weights=weights, states=states, out=out, heads=plan.heads, **gates, **_sizes(plan), **_columns(plan),
        BK=made_for.keys, BV=made_for.values, num_warps=made_for.warps, num_stages=made_for.stages,
    )  # fmt: skip
    return made


def launch_key_backward(
    plan: Plan, do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor,
    docs: Tensor, saved: list[Tensor],
) -> Six:  # fmt: skip
    """What queries want, gradients of states, changes, sums over pairs; the result is `plan.gradients`, filled."""
    dq, dk, dv, dbeta, dlog_decay, dstart = made = gradients(plan, q, k, v, beta, log_decay)
    if not plan.tokens:
        dstart.copy_(torch.zeros_like(dstart) if dfinal is None else dfinal)
        return made
    inverse, weights, kept, removal, states, halved = saved
    gates = {"beta": beta, "log_decay": log_decay, "docs": docs}
    rows = plan.batch * plan.state_heads
    partial, leaving = torch.empty_like(v), torch.empty_like(states)
    made_for = key_config("reader", plan)
    launch(
        key_reader_kernel, (rows * plan.chunks * (plan.value_dim // made_for.values),), q=q, k=k, do=do,
        inverse=inverse, weights=weights, partial=partial, states=leaving, heads=plan.heads, **gates, **_sizes(plan),
        **_columns(plan), BK=made_for.keys, BV=made_for.values, num_warps=made_for.warps, num_stages=made_for.stages,
    )  # fmt: skip
    launch_states(plan, removal, kept, dfinal, leaving, dstart, reverse=True)
    made_for = key_config("change", plan)
    parts = plan.value_dim // made_for.values
    change, missing = torch.empty_like(v), torch.empty_like(v)
    direct = q.new_empty(parts, *beta.shape, dtype=torch.float32)
    launch(
        key_change_kernel, (rows * plan.chunks * parts,), k=k, v=v, inverse=inverse, states=states, leaving=leaving,
        partial=partial, change=change, missing=missing, dv=dv, direct=direct, **gates, **_sizes(plan),
        **_columns(plan), BK=made_for.keys, BV=made_for.values, num_warps=made_for.warps, num_stages=made_for.stages,
    )  # fmt: skip
    made_for = key_config("sums", plan)
    tiles = plan.key_dim // made_for.keys
    for_beta = dbeta if tiles == 1 else q.new_empty(tiles, *beta.shape, dtype=torch.float32)
    for halves in (False, True):
        launch(
            key_sums_kernel, (rows * plan.chunks * tiles,), q=q, k=k, do=do, halved=halved, states=states,
            leaving=leaving, change=change, missing=missing, direct=direct, dq=dq, dk=dk, dbeta=for_beta,
            dlog_decay=dlog_decay, batches=plan.batch, heads=plan.heads, **gates, **_sizes(plan), **_columns(plan),
            BK=made_for.keys, BV=made_for.values, PARTS=parts, HALVED=halves, WIDE=_wide(q),
            num_warps=made_for.warps, num_stages=made_for.stages,
        )  # fmt: skip
    if for_beta is not dbeta:
        dbeta.copy_(for_beta.sum(0))
    return made


def _sizes(plan: Plan) -> dict[str, Any]:
    return {
        "tokens": plan.tokens,
        "chunks": plan.chunks,
        "state_heads": plan.state_heads,
        "K": plan.key_dim,
    }


def _columns(plan: Plan) -> dict[str, Any]:
    return {"V": plan.value_dim, "C": CHUNK, "PRECISION": plan.precision}


def _wide(q: Tensor) -> bool:
    """Whether scaled keys, which float16 could not hold, are multiplied in float32."""
    return q.dtype != torch.bfloat16
