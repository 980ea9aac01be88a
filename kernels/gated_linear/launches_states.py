"""The launches that make the states between periods, and what all launches of gated_linear share."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.kernels.gated_linear.plan import CHUNK, Plan, config
from linearize.kernels.gated_linear.triton_states import carry_kernel, scan_kernel
from linearize.kernels.launch import launch

Some = tuple[Tensor | None, Tensor | None]
NAMES = ("states", "norms", "carries", "carry_norms", "spans")


def scan(
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
        **geometry(plan) | {"heads": x.shape[2]}, DECAY=plan.decay, REVERSE=reverse, READ_BEFORE=plan.read_before,
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


def geometry(plan: Plan) -> dict[str, int]:
    """Sizes that all kernels take."""
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


def flags(plan: Plan, docs: Tensor | None) -> dict[str, bool | str]:
    """Choices that all kernels but the scan take."""
    return {
        "READ_BEFORE": plan.read_before,
        "NORMALIZE": plan.normalize,
        "HAS_DOCS": docs is not None,
        "HAS_CARRY": plan.segments > 1,
        "WIDE": plan.wide,
        "PRECISION": plan.precision,
    }
