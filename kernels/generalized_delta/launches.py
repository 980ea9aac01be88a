"""The launches of generalized_delta, forward and backward, in order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize.kernels.gated_delta.plan import Config
from linearize.kernels.gated_delta.triton_states import states_kernel
from linearize.kernels.generalized_delta.plan import CHUNK, Plan, config, gradients, outputs, shared
from linearize.kernels.generalized_delta.triton_backward import change_kernel, reader_kernel
from linearize.kernels.generalized_delta.triton_forward import output_kernel, transition_kernel
from linearize.kernels.generalized_delta.triton_gradients import gradient_kernel
from linearize.kernels.generalized_delta.triton_whole import whole_transition_kernel
from linearize.kernels.launch import launch


def launch_forward(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, docs: Tensor, start: Tensor,
    save: bool,
) -> list[Tensor]:  # fmt: skip
    """What each chunk does, states, outputs; the result is `plan.outputs`, filled."""
    made = outputs(plan, q, save)
    out, final, *saved = made
    if not plan.tokens:
        final.copy_(start)
        return made
    halved, kept, removal, states, weights, reading = saved[:6] if save else shared(plan, q)
    inverse, solved, moved = saved[6:] if save else (None, None, None)
    rows, made_for = plan.batch * plan.state_heads, config("transition", plan)
    # of float32 products on two warps ptxas makes 32 registers, 150 KB of spills and a long compilation, if not told
    most = {"maxnreg": 255} if plan.precision == "tf32x3" and made_for.warps == 2 else {}
    for again in (False, True):
        whole = made_for.keys == plan.key_dim and not again
        launch(
            whole_transition_kernel if whole else transition_kernel, (rows * plan.chunks,), q=q, k=k, v=v, a=a, b=b,
            g=log_decay, docs=docs, halved=halved, kept=kept, removal=removal, states=states, weights=weights,
            reading=reading, inverse=inverse, solved=solved, moved=moved, SAVE=save, WIDE=plan.wide,
            **_sizes(plan, made_for), **({} if whole else {"HALVED": again}),
            **most,
        )  # fmt: skip
    _states(plan, removal, kept, start, states, final, reverse=False)
    made_for = config("output", plan)
    launch(
        output_kernel, (plan.batch * plan.heads * plan.chunks * (plan.value_dim // made_for.values),), v=v,
        weights=weights, reading=reading, states=states, out=out, **_sizes(plan, made_for),
    )  # fmt: skip
    return made


def launch_backward(
    plan: Plan, do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor,
    log_decay: Tensor, docs: Tensor, saved: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """What queries want, gradients of states, of changes and of inputs; the result is `plan.gradients`, filled."""
    made = gradients(plan, (q, k, v, a, b, log_decay))
    dq, dk, dv, da, db, dg, dstart = made
    if not plan.tokens:
        dstart.copy_(torch.zeros_like(dstart) if dfinal is None else dfinal)
        return made
    halved, kept, removal, states, weights, reading, inverse, solved, moved = saved
    rows, leaving = plan.batch * plan.state_heads, torch.empty_like(states)
    change, missing = torch.empty_like(dv), torch.empty_like(dv)
    size = (plan.batch, plan.state_heads, plan.chunks, CHUNK + 1, plan.key_dim)
    sums = q.new_empty(size, dtype=torch.float32)
    made_for = config("reader", plan)
    launch(
        reader_kernel, (rows * plan.chunks * (plan.value_dim // made_for.values),), do=do, g=log_decay,
        reading=reading, states=leaving, sums=sums, **_sizes(plan, made_for),
    )  # fmt: skip
    _states(plan, removal, kept, dfinal, leaving, dstart, reverse=True)
    made_for = config("change", plan)
    launch(
        change_kernel, (rows * plan.chunks * (plan.value_dim // made_for.values),), k=k, v=v, a=a, b=b, sums=sums,
        docs=docs, do=do, weights=weights, inverse=inverse, solved=solved, moved=moved, states=states, leaving=leaving,
        change=change, missing=missing, dv=dv, **_sizes(plan, made_for),
    )  # fmt: skip
    made_for = config("gradient", plan)
    for again in (False, True):
        launch(
            gradient_kernel, (rows * plan.chunks * (plan.key_dim // made_for.keys),), q=q, k=k, v=v, a=a, b=b,
            g=log_decay, sums=sums, docs=docs, do=do, halved=halved, kept=kept, states=states, leaving=leaving,
            change=change, missing=missing, dq=dq, dk=dk, da=da, db=db, dg=dg, HALVED=again, WIDE=plan.wide,
            **_sizes(plan, made_for),
        )  # fmt: skip
    return made


def _sizes(plan: Plan, made_for: Config) -> dict[str, Any]:
    return {
        "tokens": plan.tokens,
        "chunks": plan.chunks,
        "heads": plan.heads,
        "state_heads": plan.state_heads,
        "K": plan.key_dim,
        "V": plan.value_dim,
        "BK": made_for.keys,
        "BV": made_for.values,
        "C": CHUNK,
        "PRECISION": plan.precision,
        "num_warps": made_for.warps,
        "num_stages": made_for.stages,
    }


def _states(
    plan: Plan,
    removal: Tensor,
    kept: Tensor,
    start: Tensor | None,
    states: Tensor,
    final: Tensor,
    *,
    reverse: bool,
) -> None:
    made_for = config("states", plan)
    parts = plan.value_dim // made_for.values
    launch(
        states_kernel, (plan.batch * plan.state_heads * parts,), removal=removal, kept=kept, start=start,
        states=states, final=final, chunks=plan.chunks, K=plan.key_dim, V=plan.value_dim, BV=made_for.values,
        REVERSE=reverse, HAS_START=start is not None, PRECISION=plan.precision, PER_KEY=True,
        num_warps=made_for.warps, num_stages=made_for.stages,
    )  # fmt: skip
