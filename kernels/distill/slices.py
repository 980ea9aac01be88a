"""One slice after the other: its logits, its losses, its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.distill.reference import Head, shape_logits

ELEMENTS = {"cuda": 2**26, "cpu": 2**24}
"""Logits in a slice: 128 MB in bfloat16 on a GPU, where few tokens leave the matrix product bound by its weights."""
LEAST = 256
"""Tokens that a slice has on a GPU whatever the vocabulary."""
ALIGNED = 64
"""Rows of logits start at a multiple of it, so that vectors of 16 bytes fit whatever the vocabulary."""


def slice_tokens(vocabulary: int, device: torch.device) -> int:
    """Tokens of a slice."""
    if device.type != "cuda":
        return max(1, ELEMENTS["cpu"] // vocabulary)
    return max(LEAST, ELEMENTS["cuda"] // vocabulary // LEAST * LEAST)


@dataclass(frozen=True)
class Job:
    """What the losses of a row of logits depend on beside the logits.

    Attributes:
        next_token, divergence: factors of the two losses.
        scale, softcap: of the student's logits; 0 for no cap.
        teacher_scale, teacher_softcap: of the teacher's.
    """

    next_token: float
    divergence: float
    scale: float
    softcap: float
    teacher_scale: float
    teacher_softcap: float


@dataclass
class Side:
    """One model's hidden states [N, D] and head in the compute dtype, and room for a slice of its logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    room: Tensor = field(init=False)

    def make_room(self, tokens: int) -> None:
        """Memory for the logits of a slice; rows are aligned."""
        words = len(self.weight)
        room = self.hidden.new_empty(tokens, -(-words // ALIGNED) * ALIGNED)
        # products in bfloat16 on a CPU read on behind a row, times 0, which leaves NaN what is NaN
        room[:, words:].zero_()
        self.room = room[:, :words]

    def logits(self, piece: slice) -> Tensor:
        """What the head's matrix gives for a slice [n, V], in the room that every slice shares."""
        rows = self.hidden[piece]
        out = self.room[: len(rows)]
        if self.bias is None:
            return torch.mm(rows, self.weight.t(), out=out)
        return torch.addmm(self.bias, rows, self.weight.t(), out=out)


def slices(
    student: Side,
    teacher: Side | None,
    targets: Tensor,
    weights: Tensor,
    losses: Tensor,
    job: Job,
    *,
    at_once: int,
    gradient: bool,
) -> Iterator[tuple[slice, Tensor]]:
    """Go over the slices; `losses` [N] is filled in.

    Yields:
        The slice, and the gradient [n, V] of its summed losses in what the head's matrix gave, in the compute dtype;
        without `gradient` that product itself. It is valid until the next slice.
    """
    count = len(student.hidden)
    triton = dispatch.use_triton(student.hidden)
    for side in (student, teacher):
        if side is not None:
            side.make_room(min(at_once, count))
    for start in range(0, count, at_once):
        piece = slice(start, min(start + at_once, count))
        own, theirs = student.logits(piece), None if teacher is None else teacher.logits(piece)
        rows = triton_rows if triton else torch_rows
        losses[piece] = rows(own, theirs, targets[piece], weights[piece], job, gradient)
        yield piece, own


def torch_rows(
    student: Tensor, teacher: Tensor | None, targets: Tensor, weights: Tensor, job: Job, gradient: bool
) -> Tensor:
    """Losses [n] of rows of logits [n, V]; the gradient, if asked for, is written over the student's."""
    wide = torch.promote_types(student.dtype, torch.float32)
    own = Head(student, None, job.scale, job.softcap or None)
    z = shape_logits(student.to(wide), own)
    log_student = z.log_softmax(-1)
    places = targets.clamp_min(0)[:, None]
    losses = -job.next_token * log_student.gather(1, places)[:, 0]
    log_teacher = None
    if teacher is not None:
        log_teacher = shape_logits(
            teacher.to(wide), Head(teacher, None, job.teacher_scale, job.teacher_softcap or None)
        ).log_softmax(-1)
        losses = losses + job.divergence * (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    counted = weights != 0
    if gradient:
        probability = log_student.exp()
        slope = job.next_token * probability
        slope.scatter_add_(1, places, slope.new_full((1, 1), -job.next_token).expand_as(places))
        if log_teacher is not None:
            slope = slope + job.divergence * (probability - log_teacher.exp())
        if job.softcap:
            slope = slope * (1.0 - (z / job.softcap).square())
        slope = slope * (weights.to(wide) * job.scale)[:, None]
        student.copy_(torch.where(counted[:, None], slope, 0.0))
    return torch.where(counted, losses * weights, 0.0)


def triton_rows(
    student: Tensor, teacher: Tensor | None, targets: Tensor, weights: Tensor, job: Job, gradient: bool
) -> Tensor:
    """`torch_rows` in one launch.

    Raises:
        KernelError: a dtype that the kernel does not take.
    """
    from linearize.kernels.distill.triton_rows import rows_kernel
    from linearize.kernels.launch import launch

    kinds = (torch.float32, torch.float16, torch.bfloat16)
    dispatch.require("distill", dtype=(student.dtype in kinds, f"{student.dtype} is none of {kinds}"))
    losses = weights.new_empty(len(student), dtype=torch.float32)
    wide = student.shape[1] > BLOCK // 2
    launch(
        rows_kernel, (len(student),), student=student, teacher=teacher, targets=targets.contiguous(),
        weights=weights.to(torch.float32).contiguous(), losses=losses, vocabulary=student.shape[1],
        stride=student.stride(0), next_token=job.next_token, divergence=job.divergence, scale=job.scale,
        softcap=job.softcap, teacher_scale=job.teacher_scale, teacher_softcap=job.teacher_softcap,
        HAS_TEACHER=teacher is not None, HAS_CAP=job.softcap > 0, TEACHER_CAP=job.teacher_softcap > 0,
        WRITE=gradient, BLOCK=BLOCK if wide else BLOCK // 8, num_warps=WARPS if wide else 4, num_stages=1,
    )  # fmt: skip
    return losses


BLOCK, WARPS = 4096, 16
"""Columns that a program takes at once, eight to a thread: 16 bytes in the narrow dtypes."""
