"""The launches of stretches in chunks, forward and backward, in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearize.kernels.gated_delta.plan import config as delta_config
from linearize.kernels.gated_delta.plan import make_plan as delta_plan
from linearize.kernels.gated_delta.triton_inverse import inverse_kernel
from linearize.kernels.launch import launch
from linearize.kernels.stretches.plan import CHUNK, Matrices, Plan, config
from linearize.kernels.stretches.triton_gradients import value_gradient_kernel, weight_gradient_kernel
from linearize.kernels.stretches.triton_inputs import (
    pair_gradient_kernel,
    query_gradient_kernel,
    reader_gradient_kernel,
    solve_gradient_kernel,
    writer_gradient_kernel,
)
from linearize.kernels.stretches.triton_matrices import matrices_kernel
from linearize.kernels.stretches.triton_outputs import output_kernel, reader_kernel
from linearize.kernels.stretches.triton_states import states_kernel, write_kernel


@dataclass(frozen=True)
class Inputs:
    """A call's tensors, contiguous, as `chunk.stretches_chunk` has them; `place`, `bounds` and `docs` int32."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    log_decay: Tensor | None
    shares: Tensor
    place: Tensor
    bounds: Tensor
    docs: Tensor
    start: Tensor | None

    def rule(self, plan: Plan) -> dict[str, Any]:
        """What kernels of a chunk's matrices take."""
        return {
            "k": self.k, "beta": self.beta, "log_decay": self.log_decay, "docs": self.docs, "tokens": plan.tokens,
            "chunks": plan.chunks, "state_heads": plan.state_heads, "K": plan.key_dim, "C": CHUNK,
            "HAS_DECAY": self.log_decay is not None, "PRECISION": plan.precision,
        }  # fmt: skip

    def levels(self, plan: Plan) -> dict[str, Any]:
        """What kernels that tell stretches apart take."""
        return {
            "place": self.place, "bounds": self.bounds, "tokens": plan.tokens, "chunks": plan.chunks,
            "state_heads": plan.state_heads, "K": plan.key_dim, "V": plan.value_dim, "C": CHUNK, "BITS": plan.bits,
            "LEVELS": plan.levels, "OLDER": plan.older, "PRECISION": plan.precision,
        }  # fmt: skip

    def read(self, plan: Plan) -> dict[str, Any]:
        """What kernels that weigh them take."""
        return self.levels(plan) | {"shares": self.shares, "heads": plan.heads, "MOST": plan.most}


def launch_forward(plan: Plan, given: Inputs, *, wants_final: bool) -> tuple[Tensor, Tensor]:
    """Matrices, states, outputs: out [B, T, H, V] and the final state [B, M, S, K, V], empty where it is not wanted."""
    out = given.q.new_empty(plan.batch, plan.tokens, plan.heads, plan.value_dim)
    size = plan.state_size() if wants_final else (0,)
    final = given.q.new_empty(size, dtype=torch.float32)
    if not plan.tokens:
        if wants_final:
            final.copy_(final.new_zeros(size) if given.start is None else given.start)
        return out, final
    matrices = launch_matrices(plan, given)
    states, _ = launch_states_of_chunks(plan, given, matrices, final if wants_final else None)
    made = config("output", plan)
    parts = plan.value_dim // made.values
    launch(
        output_kernel, (plan.batch * plan.heads * plan.chunks * parts,), v=given.v, weights=matrices.weights,
        readers=matrices.readers, states=states, out=out, BV=made.values, **given.read(plan), num_warps=made.warps,
        num_stages=made.stages,
    )  # fmt: skip
    return out, final


def launch_matrices(plan: Plan, given: Inputs) -> Matrices:
    """What each chunk does."""
    found, rows = Matrices.empty(plan, given.q), plan.batch * plan.state_heads * plan.chunks
    rule = given.rule(plan)
    if plan.delta:
        made = delta_config("inverse", delta_plan(given.q, given.k, given.v))
        shared = {name: value for name, value in rule.items() if name != "C"}
        launch(
            inverse_kernel, (rows,), inverse=found.inverse, kept=found.kept, BK=made.keys, **shared,
            num_warps=made.warps, num_stages=made.stages,
        )  # fmt: skip
    made = config("matrices", plan)
    launch(
        matrices_kernel, (rows,), q=given.q, inverse=found.inverse, weights=found.weights, readers=found.readers,
        writers=found.writers, removal=found.removal, kept=found.kept, heads=plan.heads, DELTA=plan.delta, **rule,
        num_warps=made.warps, num_stages=made.stages,
    )  # fmt: skip
    return found


def launch_states_of_chunks(
    plan: Plan, given: Inputs, matrices: Matrices, final: Tensor | None
) -> tuple[Tensor, Tensor]:
    """States that enter chunks, and what each chunk does to them."""
    states = plan.stored(given.q)
    marks = given.docs.new_empty(plan.batch, plan.state_heads, plan.states, plan.chunks)
    made = config("write", plan)
    parts = plan.value_dim // made.values
    launch(
        write_kernel, (plan.batch * plan.state_heads * plan.chunks * parts,), v=given.v, docs=given.docs,
        writers=matrices.writers, states=states, marks=marks, BV=made.values, **given.levels(plan),
        num_warps=made.warps, num_stages=made.stages,
    )  # fmt: skip
    launch_scan(plan, matrices, marks, given.start, states, final, reverse=False)
    return states, marks


def launch_scan(
    plan: Plan, matrices: Matrices, marks: Tensor, start: Tensor | None, states: Tensor, final: Tensor | None, *,
    reverse: bool,
) -> None:  # fmt: skip
    """The loop over chunks."""
    made = config("states" if plan.delta else "sums", plan)
    parts = plan.value_dim // made.values
    launch(
        states_kernel, (plan.batch * plan.state_heads * plan.states * parts,), removal=matrices.removal,
        kept=matrices.kept, marks=marks, start=start, states=states, final=final, chunks=plan.chunks, K=plan.key_dim,
        V=plan.value_dim, BV=made.values, S=plan.states, REVERSE=reverse, HAS_START=start is not None,
        HAS_FINAL=final is not None, DELTA=plan.delta, PRECISION=plan.precision, num_warps=made.warps,
        num_stages=made.stages,
    )  # fmt: skip


@dataclass(frozen=True)
class Gradients:
    """Empty gradients, of what has none none; of strengths and decays in float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    log_decay: Tensor | None
    shares: Tensor
    start: Tensor | None

    @classmethod
    def empty(cls, plan: Plan, given: Inputs) -> Gradients:
        """Of a call's inputs."""

        def wide(x: Tensor | None) -> Tensor | None:
            return None if x is None else torch.empty_like(x, dtype=torch.float32)

        q, k, v, shares = (torch.empty_like(x) for x in (given.q, given.k, given.v, given.shares))
        return cls(q, k, v, wide(given.beta), wide(given.log_decay), shares, wide(given.start))


def launch_backward(plan: Plan, given: Inputs, do: Tensor, dfinal: Tensor | None) -> Gradients:
    """Everything of forward but the outputs, then what queries want, gradients of states, of matrices, of inputs."""
    found = Gradients.empty(plan, given)
    if not plan.tokens:
        if found.start is not None:
            found.start.copy_(torch.zeros_like(found.start) if dfinal is None else dfinal)
        return found
    matrices = launch_matrices(plan, given)
    states, marks = launch_states_of_chunks(plan, given, matrices, None)
    leaving = torch.empty_like(states)
    rows, of_heads = plan.batch * plan.state_heads * plan.chunks, plan.batch * plan.heads * plan.chunks
    read = given.read(plan)
    made = config("reader", plan)
    launch(
        reader_kernel, (rows * (plan.value_dim // made.values),), do=do, readers=matrices.readers, leaving=leaving,
        BV=made.values, **read, num_warps=made.warps, num_stages=made.stages,
    )  # fmt: skip
    launch_scan(plan, matrices, marks, dfinal, leaving, found.start, reverse=True)
    has_decay = given.log_decay is not None
    dwriters, dkept = torch.empty_like(matrices.writers), torch.empty_like(matrices.kept)
    dremoval = None if matrices.removal is None else torch.empty_like(matrices.removal)
    made = config("value_gradient", plan)
    launch(
        value_gradient_kernel, (rows,), v=given.v, do=do, docs=given.docs, weights=matrices.weights,
        writers=matrices.writers, kept=matrices.kept, marks=marks, states=states, leaving=leaving, dv=found.v,
        dwriters=dwriters, dremoval=dremoval, dkept=dkept, BV=made.values, DELTA=plan.delta, HAS_DECAY=has_decay,
        **read, num_warps=made.warps, num_stages=made.stages,
    )  # fmt: skip
    dweights, dreaders = torch.empty_like(matrices.weights), torch.empty_like(matrices.readers)
    made = config("weight_gradient", plan)
    launch(
        weight_gradient_kernel, (of_heads,), v=given.v, do=do, weights=matrices.weights, readers=matrices.readers,
        states=states, dweights=dweights, dreaders=dreaders, dshares=found.shares, BV=made.values,
        WIDTH=1 << plan.most.bit_length(), **read, num_warps=made.warps, num_stages=made.stages,
    )  # fmt: skip
    del states, leaving
    _inputs(plan, given, matrices, found, dweights, dreaders, dwriters, dremoval, dkept)
    return found


def _inputs(
    plan: Plan, given: Inputs, matrices: Matrices, found: Gradients, dweights: Tensor, dreaders: Tensor,
    dwriters: Tensor, dremoval: Tensor | None, dkept: Tensor,
) -> None:  # fmt: skip
    """From gradients of matrices to those of queries, keys, strengths and decays."""
    rule = given.rule(plan) | {"heads": plan.heads, "DELTA": plan.delta}
    rows, of_heads = plan.batch * plan.state_heads * plan.chunks, plan.batch * plan.heads * plan.chunks
    moved = given.q.new_empty(given.q.shape[:3], dtype=torch.float32)
    made = config("query_gradient", plan)
    launch(
        query_gradient_kernel, (of_heads,), q=given.q, inverse=matrices.inverse, dweights=dweights, dreaders=dreaders,
        dq=found.q, moved=moved, **rule, num_warps=made.warps, num_stages=made.stages,
    )  # fmt: skip
    partial = torch.empty_like(given.k, dtype=torch.float32)
    along = given.k.new_empty(given.k.shape[:3], dtype=torch.float32)
    apart = None
    if plan.delta:
        made = config("solve_gradient", plan)
        apart = given.q.new_empty(plan.batch, plan.state_heads, plan.chunks, CHUNK, CHUNK)
        whole = {name: value for name, value in rule.items() if name != "DELTA"}
        launch(
            solve_gradient_kernel, (rows,), q=given.q, inverse=matrices.inverse, dweights=dweights, dwriters=dwriters,
            dremoval=dremoval, apart=apart, dbeta=found.beta, **whole, num_warps=made.warps, num_stages=made.stages,
        )  # fmt: skip
    made = config("reader_gradient", plan)
    launch(
        reader_gradient_kernel, (rows,), q=given.q, inverse=matrices.inverse, weights=matrices.weights,
        dweights=dweights, dreaders=dreaders, partial=partial, along=along, **rule, num_warps=made.warps,
        num_stages=made.stages,
    )  # fmt: skip
    made = config("writer_gradient", plan)
    launch(
        writer_gradient_kernel, (rows,), inverse=matrices.inverse, writers=matrices.writers, dwriters=dwriters,
        dremoval=dremoval, dkept=dkept, moved=moved, partial=partial, along=along, dk=found.k,
        dlog_decay=found.log_decay, **rule, num_warps=made.warps, num_stages=made.stages,
    )  # fmt: skip
    if not plan.delta:
        return
    made = config("pair_gradient", plan)
    shared = {
        name: value for name, value in rule.items() if name not in ("heads", "DELTA", "log_decay", "docs")
    }
    launch(
        pair_gradient_kernel, (rows,), apart=apart, partial=partial, dk=found.k, dbeta=found.beta,
        dlog_decay=found.log_decay, **shared, num_warps=made.warps, num_stages=made.stages,
    )  # fmt: skip
