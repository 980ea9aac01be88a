"""The launches where every key dimension has its decay, or every value dimension: the same, the other way round."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize.kernels.gated_linear.launches_states import flags, geometry
from linearize.kernels.gated_linear.periods import NAMES
from linearize.kernels.gated_linear.plan import BLOCK, Plan, config, key_columns
from linearize.kernels.gated_linear.triton_key import (
    key_gradient_kernel,
    key_output_kernel,
    value_output_kernel,
)
from linearize.kernels.launch import launch


def key_outputs(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor | None, docs: Tensor | None,
    stored: list[Tensor], marks: Tensor, out: Tensor, denominator: Tensor | None,
) -> None:  # fmt: skip
    """Numerators and denominators from the states; fills `marks` too."""
    for name in ("whole", "halved"):
        made = config(f"key_output_{name}", plan)
        columns = min(made.columns, plan.value_dim)
        launch(
            key_output_kernel, (plan.tiles * (plan.value_dim // columns), plan.batch * plan.heads),
            q=q, k=k, v=v, g=log_decay, bonus=bonus, docs=docs, out=out, denominator=denominator,
            **dict(zip(NAMES, stored, strict=True)), **_levels(plan, marks, name), BV=columns,
            HAS_BONUS=bonus is not None, **geometry(plan), **flags(plan, docs),
            num_warps=made.warps, num_stages=made.stages,
        )  # fmt: skip


def key_gradients(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor | None, docs: Tensor | None,
    do: Tensor, weight: Tensor | None, stored: list[Tensor], marks: Tensor, ahead: list[Tensor],
    dq: Tensor | None, dk: Tensor | None, dv: Tensor, dg: Tensor, *, add: bool = False,
) -> Tensor | None:  # fmt: skip
    """dq, dk, dv and the decays' gradient from the states of both directions.

    Args:
        dq: None where nobody wants it.
        dk: None if k is 1 - exp(log_decay): then its gradient goes into that of the decays.
        add: to what dg holds, in place of writing over it.

    Returns:
        The gradient of the bonus [M, K], float32, or None without a bonus.
    """
    parts = None
    if bonus is not None:
        size = (plan.batch, plan.state_heads, plan.tiles, plan.key_dim)
        parts = q.new_empty(size, dtype=torch.float32)
    for name, sums, products in (("whole", True, True), ("halved", True, False), ("halved", False, True)):
        made = config(f"key_gradient_{name}", plan)
        columns, value_columns = key_columns(plan, name), min(made.columns, plan.value_dim)
        roles = sums * (plan.key_dim // columns) + products * (plan.value_dim // value_columns)
        launch(
            key_gradient_kernel, (plan.tiles * roles, plan.batch * plan.state_heads),
            q=q, k=k, v=v, g=log_decay, bonus=bonus, docs=docs, do=do, weight=weight,
            **dict(zip(NAMES, stored, strict=True)),
            **dict(zip(("ahead", *(f"ahead_{name}" for name in NAMES[1:])), ahead, strict=True)),
            dq=dq, dk=dk, dv=dv, dg=dg, dbonus=parts, BV=value_columns, COLUMNS=columns, SUMS=sums, PRODUCTS=products,
            WITH_Q=dq is not None, COMPLEMENT=dk is None, ADD=add, HAS_BONUS=bonus is not None,
            **_levels(plan, marks, name), **geometry(plan), **flags(plan, docs),
            num_warps=made.warps, num_stages=made.stages,
        )  # fmt: skip
    return None if parts is None else parts.sum((0, 2))


def value_outputs(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, docs: Tensor | None, stored: list[Tensor],
    marks: Tensor, out: Tensor, softmax: int = 0,
) -> None:  # fmt: skip
    """Outputs where values decay; fills `marks` too.

    Args:
        plan: its key dimensions are those that decay, here the values; its values those of q and k.
        stored: states, transposed, [V, K].
        softmax: over how many of the first columns of each row, which must fit into one program; 0: none.
    """
    for name in ("whole", "halved"):
        made = config(f"value_output_{name}", plan)
        columns = min(made.columns, plan.key_dim)
        sizes = geometry(plan) | {"K": plan.value_dim, "V": plan.key_dim}
        chosen = flags(plan, docs)
        del chosen["NORMALIZE"]
        launch(
            value_output_kernel, (plan.tiles * (plan.key_dim // columns), plan.batch * plan.heads),
            q=q, k=k, v=v, g=log_decay, docs=docs, out=out, halved=marks, **dict(zip(NAMES, stored, strict=True)),
            width=softmax, BV=columns, HALVED=name == "halved", SOFTMAX=softmax > 0, **sizes, **chosen,
            num_warps=made.warps, num_stages=made.stages,
        )  # fmt: skip


def _levels(plan: Plan, marks: Tensor, name: str) -> dict[str, Any]:
    """What the launches for whole and for halved chunks do not share."""
    return {"halved": marks, "HALVED": name == "halved", "BK": min(BLOCK[name], plan.key_dim)}
