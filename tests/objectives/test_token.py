"""Model objectives: values and gradients against whole-tensor autograd in float64, slices or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from linearize import objectives
from linearize.objectives import token

B, T, V = 2, 11, 13


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Logits with a graph, teacher logits, labels of which some carry no loss."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(B, T, V, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(B, T, V, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, :4] = -100
    return logits, teacher, labels


def test_targets_are_the_next_tokens_of_the_same_document() -> None:
    labels = torch.tensor([[5, 6, 7, -100, 9, 10]])
    assert objectives.next_targets(labels).tolist() == [[6, 7, -100, 9, 10, -100]]
    positions = torch.tensor([[0, 1, 0, 1, 2, 3]])
    assert objectives.next_targets(labels, positions).tolist() == [[6, -100, -100, 9, 10, -100]]


@pytest.mark.parametrize("slice_elements", [1, 5 * V, 2**24])
def test_value_and_gradient(slice_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token, "SLICE_ELEMENTS", slice_elements)
    logits, teacher, labels = inputs()
    targets = objectives.next_targets(labels)
    labeled = targets != -100
    nll = F.cross_entropy(logits[labeled], targets[labeled])
    p = teacher[labeled].softmax(-1)
    kl = (p * (p.log() - logits[labeled].log_softmax(-1))).sum(-1).mean()
    loss = 0.7 * nll + 2.0 * kl
    (gradient,) = torch.autograd.grad(loss, logits)
    value = objectives.token_backward(logits, targets, {"next_token": 0.7, "logits_kl": 2.0}, teacher=teacher)
    assert not value.requires_grad
    torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(logits.grad, gradient)


def test_kl_to_itself_is_zero() -> None:
    logits, _, labels = inputs()
    value = objectives.token_backward(
        logits, objectives.next_targets(labels), {"logits_kl": 1.0}, teacher=logits.detach()
    )
    assert abs(value) < 1e-12
    assert logits.grad.abs().max() < 1e-12


def test_micro_batches_with_a_common_count_equal_one_batch() -> None:
    logits, _, labels = inputs()
    targets = objectives.next_targets(labels)
    whole = objectives.token_backward(logits, targets, {"next_token": 1.0})
    gradient = logits.grad.clone()
    logits.grad = None
    count = (targets != -100).sum()
    parts = [
        objectives.token_backward(logits[i : i + 1], targets[i : i + 1], {"next_token": 1.0}, count=count)
        for i in range(B)
    ]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(logits.grad, gradient)


def test_no_labels_gives_zero_and_not_nan() -> None:
    logits, _, labels = inputs()
    value = objectives.token_backward(logits, torch.full_like(labels, -100), {"next_token": 1.0})
    assert value == 0
    assert (logits.grad == 0).all()


def test_gradient_has_the_dtype_of_the_logits() -> None:
    logits, teacher, labels = inputs()
    low = logits.detach().bfloat16().requires_grad_()
    value = objectives.token_backward(
        low, objectives.next_targets(labels), {"logits_kl": 1.0}, teacher=teacher.bfloat16()
    )
    assert value.dtype == torch.float32
    assert low.grad.dtype == torch.bfloat16
