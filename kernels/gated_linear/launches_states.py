"""The launches that make the states between periods, and what all launches of gated_linear share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.kernels.gated_linear.periods import Periods, Some
from linearize.kernels.gated_linear.plan import Plan, config
from linearize.kernels.gated_linear.triton_states import carry_kernel, scan_kernel
from linearize.kernels.launch import launch


def scan(
    plan: Plan, x: Tensor, y: Tensor, weight: Tensor | None, log_decay: Tensor | None, docs: Tensor | None, start: Some,
    stored: list[Tensor], final: list[Tensor] | None, *, reverse: bool,
) -> None:  # fmt: skip
    """States of the periods, and the state at the end of the scan where `final` is given."""
    if nothing(plan, start, final):
        return
    pieces = Pieces.of(plan, x, stored, final)
    made = config("scan", plan)
    columns = min(made.columns, plan.value_dim)
    launch(
        scan_kernel, (plan.value_dim // columns, plan.batch * plan.state_heads * plan.segments),
        x=x, y=y, weight=weight, g=log_decay, docs=docs, start=start[0], start_norm=start[1],
        **pieces.arguments(stored), BV=columns, **geometry(plan) | {"heads": x.shape[2]}, DECAY=plan.decay,
        REVERSE=reverse, READ_BEFORE=plan.read_before, NORMALIZE=plan.normalize, HAS_DOCS=docs is not None,
        HAS_START=start[0] is not None, PRECISION=plan.precision, num_warps=made.warps, num_stages=made.stages,
    )  # fmt: skip
    pieces.carry(plan, stored, final, reverse=reverse)


def nothing(plan: Periods, start: Some, final: list[Tensor] | None) -> bool:
    """Whether there is nothing to scan; then the state at the end is the carried one."""
    if plan.tiles and plan.batch:
        return False
    for given, to in zip(start, final or (), strict=False):
        to.copy_(torch.zeros_like(to) if given is None else given)
    return True


@dataclass
class Pieces:
    """What the pieces of a scan add up to, before they are carried on.

    Attributes:
        totals: sums and norms of each piece; of a scan in one piece the state at its end itself, or None.
        spans: decays over each piece.
    """

    totals: list[Tensor] | None
    spans: Tensor

    @classmethod
    def of(cls, plan: Periods, x: Tensor, stored: list[Tensor], final: list[Tensor] | None) -> Pieces:
        """Empty."""
        _, _, carries, carry_norms, spans = stored
        size = (plan.batch, plan.state_heads, plan.segments, *spans.shape[3:])
        if plan.segments > 1:
            final = [torch.empty_like(carries, dtype=torch.float32), torch.empty_like(carry_norms)]
        return cls(final, x.new_empty(size, dtype=torch.float32))

    def arguments(self, stored: list[Tensor]) -> dict[str, Tensor | bool | None]:
        """What the scan's kernel writes."""
        states, norms, _, _, spans = stored
        totals, total_norms = (None, None) if self.totals is None else self.totals
        return {
            "states": states, "norms": norms, "spans": spans, "totals": totals, "total_norms": total_norms,
            "total_spans": self.spans, "HAS_TOTALS": self.totals is not None,
        }  # fmt: skip

    def carry(
        self,
        plan: Periods,
        stored: list[Tensor],
        final: list[Tensor] | None,
        *,
        reverse: bool,
    ) -> None:
        """From piece to piece, where there are several."""
        if plan.segments == 1 or self.totals is None:
            return
        features = self.spans[0, 0, 0].numel()
        for at, (total, carry) in enumerate(zip(self.totals, stored[2:4], strict=True)):
            if at and not plan.normalize:
                continue
            number = total[0, 0, 0].numel()
            block = min(1024, 1 << (number - 1).bit_length())
            launch(
                carry_kernel, (-(-number // block), plan.batch * plan.state_heads),
                totals=total, spans=self.spans, carries=carry, final=None if final is None else final[at],
                segments=plan.segments, size=number, width=number // features, features=features, REVERSE=reverse,
                HAS_FINAL=final is not None, BLOCK=block, num_warps=4, num_stages=1,
            )  # fmt: skip


def geometry(plan: Plan) -> dict[str, int]:
    """Sizes that all kernels take."""
    return plan.geometry() | {
        "heads": plan.heads,
        "state_heads": plan.state_heads,
        "K": plan.key_dim,
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
