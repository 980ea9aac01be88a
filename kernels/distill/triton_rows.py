"""Cross-entropy and KL divergence of rows of logits, and their gradient in the place of the student's logits.

A program owns a row and goes over the vocabulary twice: once for the softmax of student and teacher and the sums of
both losses, with a running maximum for every lane; once for the gradient. Two reads, one write.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def shaped(values, scale, softcap, HAS_CAP: tl.constexpr):
    """Logits of what the head's matrix gives, float32."""
    values = values * scale
    if HAS_CAP:
        values = softcap * (2.0 * tl.sigmoid(2.0 * values / softcap) - 1.0)
    return values


@triton.jit
def load_logits(rows, columns, vocabulary, stride, scale, softcap, HAS_CAP: tl.constexpr):
    """A block of logits, float32, any number behind the vocabulary. The stride's mask keeps vectors whole."""
    found = tl.load(rows + columns, mask=columns < stride, other=0.0).to(tl.float32)
    return shaped(tl.where(columns < vocabulary, found, 0.0), scale, softcap, HAS_CAP)


@triton.jit
def power(values):
    """e to the power of differences of logits."""
    return tl.exp2(values * LOG2E)


@triton.jit(
    do_not_specialize=["scale", "softcap", "teacher_scale", "teacher_softcap", "next_token", "divergence"]
)
def rows_kernel(
    student, teacher, targets, weights, losses, vocabulary, stride, next_token, divergence, scale, softcap,
    teacher_scale, teacher_softcap,
    HAS_TEACHER: tl.constexpr, HAS_CAP: tl.constexpr, TEACHER_CAP: tl.constexpr, WRITE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows). Rows are `stride` numbers apart; what stands behind the vocabulary is undefined."""
    row = tl.program_id(0)
    student += tl.cast(row, tl.int64) * stride
    if HAS_TEACHER:
        teacher += tl.cast(row, tl.int64) * stride
    lanes = tl.arange(0, BLOCK)
    weight = tl.load(weights + row)
    if weight == 0.0:
        tl.store(losses + row, 0.0)
        if WRITE:
            nothing = tl.zeros([BLOCK], tl.float32).to(student.dtype.element_ty)
            for start in range(0, vocabulary, BLOCK):
                tl.store(student + start + lanes, nothing, mask=start + lanes < stride)
    else:
        target = tl.load(targets + row)
        # read before the gradient takes its place
        chosen = shaped(tl.load(student + target).to(tl.float32), scale, softcap, HAS_CAP)
        top = tl.full([BLOCK], LOWEST, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        teacher_top = tl.full([BLOCK], LOWEST, tl.float32)
        teacher_total = tl.zeros([BLOCK], tl.float32)
        gap = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocabulary, BLOCK):
            columns = start + lanes
            inside = columns < vocabulary
            z = load_logits(student, columns, vocabulary, stride, scale, softcap, HAS_CAP)
            z = tl.where(inside, z, LOWEST)
            highest = tl.maximum(top, z)
            total = total * power(top - highest) + power(z - highest)
            top = highest
            if HAS_TEACHER:
                t = load_logits(
                    teacher, columns, vocabulary, stride, teacher_scale, teacher_softcap, TEACHER_CAP
                )
                t = tl.where(inside, t, LOWEST)
                highest = tl.maximum(teacher_top, t)
                past, now = power(teacher_top - highest), power(t - highest)
                teacher_total = teacher_total * past + now
                gap = gap * past + now * (t - z)
                teacher_top = highest
        highest = tl.max(top, 0)
        log_sum = highest + tl.log(tl.sum(total * power(top - highest), 0))
        loss = next_token * (log_sum - chosen)
        teacher_log_sum = log_sum
        if HAS_TEACHER:
            highest = tl.max(teacher_top, 0)
            share = power(teacher_top - highest)
            mass = tl.sum(teacher_total * share, 0)
            teacher_log_sum = highest + tl.log(mass)
            loss += divergence * (tl.sum(gap * share, 0) / mass - teacher_log_sum + log_sum)
        tl.store(losses + row, weight * loss)
        if WRITE:
            for start in range(0, vocabulary, BLOCK):
                columns = start + lanes
                z = load_logits(student, columns, vocabulary, stride, scale, softcap, HAS_CAP)
                slope = next_token * (power(z - log_sum) - tl.where(columns == target, 1.0, 0.0))
                if HAS_TEACHER:
                    t = load_logits(
                        teacher, columns, vocabulary, stride, teacher_scale, teacher_softcap, TEACHER_CAP
                    )
                    slope += divergence * (power(z - log_sum) - power(t - teacher_log_sum))
                if HAS_CAP:
                    slope *= 1.0 - (z / softcap) * (z / softcap)
                slope *= weight * scale
                tl.store(student + columns, slope.to(student.dtype.element_ty), mask=columns < stride)
