"""The definition: both matrices of some query rows, dense. Quadratic; float64 in, float64 out, sixteen bits widened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from linearize.kernels.chunks.precision import at_least_float32
from linearize.kernels.window.merge import add_sink
from linearize.kernels.window.reference import window_reference
from linearize.kernels.window_linear.reference import divide

Kind = Literal["cross_entropy", "squares"]
KINDS: tuple[str, ...] = get_args(Kind)
SMALLEST = 1e-12
"""Student weights are clamped here before a logarithm; below it they give no gradient."""


@dataclass(frozen=True)
class Softmax:
    """The teacher's weights, softmax over the keys that a query sees; they take no gradient.

    Attributes:
        q, k: [B, T, H, K] and [B, T, N, K], N dividing H.
        scaling, softcap: of the scores; None for no cap.
        window: tokens that a query sees, its own included, or None for all.
        sink: [H], a logit that takes weight and belongs to no key, or None.
    """

    q: Tensor
    k: Tensor
    scaling: float
    softcap: float | None = None
    window: int | None = None
    sink: Tensor | None = None


@dataclass(frozen=True)
class Products:
    """The student's weights w_ts = q_t.k_s exp(total_t - total_s), over their sum along the row where `normalized`.

    Attributes:
        q, k: features [B, T, H, F] and [B, T, M, F], M dividing H.
        total: [B, T, M] sums of log decays along the text, never rising, float64 where digits matter; None: no decay.
        normalized: whether rows add up to one; a row whose sum is zero is zero.
    """

    q: Tensor
    k: Tensor
    total: Tensor | None = None
    normalized: bool = True


def compared(kind: Kind, teacher: Tensor, student: Tensor) -> Tensor:
    """What a row of weights differs by, summed over the last axis.

    ``cross_entropy``: -sum_s a_s log max(w_s, SMALLEST), a the teacher's. ``squares``: sum_s (w_s - a_s)^2.
    """
    if kind == "squares":
        return (student - teacher).square().sum(-1)
    return -(teacher * student.clamp_min(SMALLEST).log()).sum(-1)


def mixing_matrix_reference(
    kind: Kind, teacher: Softmax, student: Products, codes: Tensor | None, rows: slice | None = None
) -> Tensor:
    """`compared` of every query row, or of `rows`.

    Args:
        codes: [B, T] document of each token, not falling along a row, or -1 - document at padding, which sees and
            shows nothing. None: one document, no padding.

    Returns:
        [B, R, H].
    """
    tokens = teacher.q.shape[1]
    rows = slice(0, tokens) if rows is None else rows
    seen = slice(0, rows.stop)
    order = torch.arange(rows.stop, device=teacher.q.device)
    age = order[rows, None] - order
    visible = (age >= 0)[None]
    if codes is not None:
        own, other = codes[:, rows, None], codes[:, None, seen]
        visible = visible & (own == other) & (other >= 0)
    near = visible if teacher.window is None else visible & (age < teacher.window)
    q, k, sink = at_least_float32(teacher.q[:, rows], teacher.k[:, seen], teacher.sink)
    found = window_reference(q, k, None, near, scaling=teacher.scaling, softcap=teacher.softcap)
    numerator, denominator, _ = found if sink is None else add_sink(found, sink)
    return compared(kind, divide(numerator, denominator).detach(), _weights(student, rows, seen, visible))


def _weights(student: Products, rows: slice, seen: slice, visible: Tensor) -> Tensor:
    """The student's [B, R, H, S]."""
    q, k = at_least_float32(student.q[:, rows], student.k[:, seen])
    heads = k.shape[2]
    products = torch.einsum("brmgf,bsmf->bmgrs", q.unflatten(2, (heads, -1)), k) * visible[:, None, None]
    if student.total is not None:
        faded = student.total[:, rows, None] - student.total[:, None, seen]
        faded = faded.masked_fill(~visible[..., None], 0.0).exp()
        products = products * faded.permute(0, 3, 1, 2)[:, :, None].to(products.dtype)
    weights = products.flatten(1, 2).transpose(1, 2)
    return divide(weights, weights.sum(-1)) if student.normalized else weights
