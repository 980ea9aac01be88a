"""The divergence over a teacher's likeliest tokens and a bucket for the rest: dense at all tokens, a bound below."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from linearize.objectives import TopK, token_backward
from linearize.objectives.top_k import divergence

TOKENS, VOCABULARY = 12, 40


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        3 * torch.randn(TOKENS, VOCABULARY, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return student, teacher


def dense(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    own, theirs = student.log_softmax(-1), teacher.log_softmax(-1)
    return F.kl_div(own, theirs, log_target=True, reduction="none").sum(-1)


def test_all_tokens_are_the_dense_divergence(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = logits
    leaves = [student.clone().requires_grad_() for _ in range(2)]
    found = divergence(leaves[0], TopK.of(teacher, VOCABULARY))
    expected = dense(leaves[1], teacher)
    torch.testing.assert_close(found, expected)
    for value in (found, expected):
        value.sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_fewer_are_a_bound_that_more_tighten(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Merging outcomes never adds to a divergence."""
    student, teacher = logits
    found = [divergence(student, TopK.of(teacher, count)) for count in range(1, VOCABULARY + 1)]
    for less, more in itertools.pairwise(found):
        assert (less <= more + 1e-12).all() and (less >= 0).all()
    assert (found[3] < dense(student, teacher) - 1e-3).all()


@pytest.mark.parametrize("count", [1, 5, VOCABULARY - 1])
def test_what_is_compared(count: int, logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    """K probabilities and what is left to one, written out; gradients by differences."""
    student, teacher = logits
    kept = TopK.of(teacher, count)
    p, q = teacher.softmax(-1).gather(-1, kept.ids), student.softmax(-1).gather(-1, kept.ids)
    left = [1 - x.sum(-1) for x in (p, q)]
    expected = (p * (p / q).log()).sum(-1) + left[0] * (left[0] / left[1]).log()
    torch.testing.assert_close(divergence(student, kept), expected)
    assert torch.autograd.gradcheck(lambda x: divergence(x, kept), student.requires_grad_())


def test_a_teacher_that_is_certain(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Nothing is left for the bucket, and nothing becomes NaN."""
    student = logits[0].float().requires_grad_()
    teacher = torch.full((TOKENS, VOCABULARY), -300.0)
    teacher[:, 7] = 300.0
    found = divergence(student, TopK.of(teacher, 3))
    torch.testing.assert_close(found, -student.log_softmax(-1)[:, 7])
    found.sum().backward()
    assert student.grad is not None and student.grad.isfinite().all()


def test_the_same_student_has_none(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    student = logits[1].clone().requires_grad_()
    found = divergence(student, TopK.of(logits[1], 4))
    assert found.abs().max() < 1e-12
    found.sum().backward()
    assert student.grad is not None and student.grad.abs().max() < 1e-12


def test_in_a_step_beside_targets(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    """As the stage calls it, with a mask; all tokens give what the teacher's logits give."""
    student, teacher = (x.float().view(2, 6, VOCABULARY) for x in logits)
    targets = torch.arange(12).view(2, 6)
    targets[0, 3] = -100
    found, gradients = [], []
    for against in (teacher, TopK.of(teacher, VOCABULARY), TopK.of(teacher, 4)):
        leaf = student.clone().requires_grad_()
        found.append(token_backward(leaf, targets, {"next_token": 0.5, "logits_kl": 2.0}, teacher=against))
        assert leaf.grad is not None and leaf.grad[0, 3].abs().max() == 0
        gradients.append(leaf.grad)
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert found[2] < found[0]
