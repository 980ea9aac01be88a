"""The launches of gated_delta, forward and backward, in order."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.kernels.gated_delta.plan import CHUNK, Plan, Six, config, gradients, outputs
from linearize.kernels.gated_delta.triton_backward import (
    change_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
    reader_kernel,
)
from linearize.kernels.gated_delta.triton_forward import output_kernel, transition_kernel
from linearize.kernels.gated_delta.triton_inverse import inverse_kernel
from linearize.kernels.gated_delta.triton_states import states_kernel
from linearize.kernels.launch import launch


def launch_forward(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    docs: Tensor,
    start: Tensor,
) -> Six:
    """Inverses, what each chunk does to the state, states, outputs; the result is `plan.outputs`, filled."""
    out, final, inverse, kept, removal, states = made = outputs(plan, q)
    launch_states_of_chunks(plan, k, v, beta, log_decay, docs, start, final, inverse, kept, removal, states)
    if not plan.tokens:
        return made
    made_for = config("output", plan)
    launch(
        output_kernel, (plan.batch * plan.state_heads * plan.chunks * (plan.value_dim // made_for.values),), q=q, k=k,
        v=v, beta=beta, log_decay=log_decay, docs=docs, HAS_DECAY=log_decay is not None, inverse=inverse,
        states=states, out=out, heads=plan.heads, tokens=plan.tokens, chunks=plan.chunks,
        state_heads=plan.state_heads, K=plan.key_dim, V=plan.value_dim, C=CHUNK, PRECISION=plan.precision,
        BV=made_for.values, num_warps=made_for.warps, num_stages=made_for.stages,
    )  # fmt: skip
    return made


def launch_states_of_chunks(
    plan: Plan, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, docs: Tensor, start: Tensor,
    final: Tensor, inverse: Tensor, kept: Tensor, removal: Tensor, states: Tensor,
) -> None:  # fmt: skip
    """Everything of a forward pass but the outputs, into the last five."""
    if not plan.tokens:
        final.copy_(start)
        return
    gates = {"beta": beta, "log_decay": log_decay, "docs": docs, "HAS_DECAY": log_decay is not None}
    sizes = {"tokens": plan.tokens, "chunks": plan.chunks, "state_heads": plan.state_heads, "K": plan.key_dim}
    columns = {"V": plan.value_dim, "C": CHUNK, "PRECISION": plan.precision}
    rows = plan.batch * plan.state_heads
    made_for = config("inverse", plan)
    launch(
        inverse_kernel, (rows * plan.chunks,), k=k, inverse=inverse, kept=kept, **gates, **sizes, BK=made_for.keys,
        PRECISION=plan.precision, num_warps=made_for.warps, num_stages=made_for.stages,
    )  # fmt: skip
    made_for = config("transition", plan)
    launch(
        transition_kernel, (rows * plan.chunks,), k=k, v=v, inverse=inverse, removal=removal, states=states, **gates,
        **sizes, **columns, BK=made_for.keys, BV=made_for.values, num_warps=made_for.warps, num_stages=made_for.stages,
    )  # fmt: skip
    launch_states(plan, removal, kept, start, states, final, reverse=False)


def launch_backward(
    plan: Plan, do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor,
    log_decay: Tensor | None, docs: Tensor, inverse: Tensor, kept: Tensor, removal: Tensor, states: Tensor,
) -> Six:  # fmt: skip
    """What queries want, gradients of states, changes, gradients of inputs; the result is `plan.gradients`, filled."""
    dq, dk, dv, dbeta, dlog_decay, dstart = made = gradients(plan, q, k, v, beta, log_decay)
    if not plan.tokens:
        dstart.copy_(torch.zeros_like(dstart) if dfinal is None else dfinal)
        return made
    decays = {"log_decay": log_decay, "docs": docs, "HAS_DECAY": log_decay is not None}
    gates = {"beta": beta, **decays}
    sizes = {"tokens": plan.tokens, "chunks": plan.chunks, "state_heads": plan.state_heads, "K": plan.key_dim}
    columns = {"V": plan.value_dim, "C": CHUNK, "PRECISION": plan.precision}
    rows = plan.batch * plan.state_heads
    partial, leaving = torch.empty_like(v), torch.empty_like(states)
    made_for = config("reader", plan)
    launch(
        reader_kernel, (rows * plan.chunks * (plan.value_dim // made_for.values),), q=q, k=k, do=do, inverse=inverse,
        partial=partial, states=leaving, heads=plan.heads, **gates, **sizes, **columns, BV=made_for.values,
        num_warps=made_for.warps, num_stages=made_for.stages,
    )  # fmt: skip
    launch_states(plan, removal, kept, dfinal, leaving, dstart, reverse=True)
    made_for = config("change", plan)
    parts = plan.value_dim // made_for.values
    change, missing = torch.empty_like(v), torch.empty_like(v)
    direct, read = (q.new_empty(parts, *beta.shape, dtype=torch.float32) for _ in range(2))
    overlap = q.new_empty(parts, rows, plan.chunks, dtype=torch.float32)
    launch(
        change_kernel, (rows * plan.chunks * parts,), k=k, v=v, inverse=inverse, states=states, leaving=leaving,
        kept=kept, partial=partial, change=change, missing=missing, dv=dv, direct=direct, read=read, overlap=overlap,
        **gates, **sizes, **columns, BV=made_for.values, num_warps=made_for.warps, num_stages=made_for.stages,
    )  # fmt: skip
    made_for = config("query_gradient", plan)
    query_parts = plan.key_dim // made_for.keys
    moved = q.new_empty(query_parts, *q.shape[:3], dtype=torch.float32)
    launch(
        query_gradient_kernel, (plan.batch * plan.heads * plan.chunks * query_parts,), q=q, k=k, do=do, states=states,
        change=change, dq=dq, moved=moved, heads=plan.heads, **decays, **sizes, **columns, BK=made_for.keys,
        BV=made_for.values, num_warps=made_for.warps, num_stages=made_for.stages,
    )  # fmt: skip
    made_for = config("key_gradient", plan)
    key_parts = plan.key_dim // made_for.keys
    for_beta, for_log_decay = dbeta, dlog_decay
    if key_parts > 1:
        for_beta = q.new_empty(key_parts, *beta.shape, dtype=torch.float32)
        for_log_decay = torch.empty_like(for_beta)
    launch(
        key_gradient_kernel, (rows * plan.chunks * key_parts,), q=q, k=k, do=do, states=states, leaving=leaving,
        change=change, missing=missing, dv=dv, direct=direct, read=read, overlap=overlap, moved=moved, dk=dk,
        dbeta=for_beta, dlog_decay=for_log_decay, batches=plan.batch, heads=plan.heads, **gates, **sizes, **columns,
        BK=made_for.keys, BV=made_for.values, PARTS=parts, QUERY_PARTS=query_parts, num_warps=made_for.warps,
        num_stages=made_for.stages,
    )  # fmt: skip
    if key_parts > 1:
        dbeta.copy_(for_beta.sum(0))
        if log_decay is not None:
            dlog_decay.copy_(for_log_decay.sum(0))
    return made


def launch_states(
    plan: Plan,
    removal: Tensor,
    kept: Tensor,
    start: Tensor | None,
    states: Tensor,
    final: Tensor,
    *,
    reverse: bool,
) -> None:
    """The loop over chunks; `kept` has one decay a chunk, or with one dimension more one a key dimension."""
    made_for = config("states", plan)
    parts = plan.value_dim // made_for.values
    launch(
        states_kernel, (plan.batch * plan.state_heads * parts,), removal=removal, kept=kept, start=start,
        states=states, final=final, chunks=plan.chunks, K=plan.key_dim, V=plan.value_dim, BV=made_for.values,
        REVERSE=reverse, HAS_START=start is not None, PER_KEY=kept.dim() == 4, PRECISION=plan.precision,
        num_warps=made_for.warps, num_stages=made_for.stages,
    )  # fmt: skip
