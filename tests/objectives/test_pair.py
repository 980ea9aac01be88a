"""Preference objectives: value and gradient against the formula on whole tensors, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linearize import objectives
from linearize.objectives import token

B, T, V, BETA = 3, 14, 13, 0.3


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits with a graph, teacher logits, labels and sides: prompt 2, chosen 4, prompt 2, rejected 3, padding 3."""
    generator = torch.Generator().manual_seed(1)
    logits, teacher = torch.randn(2, B, T, V, generator=generator, dtype=torch.float64)
    side = torch.tensor([0, 0, 1, 1, 1, 1, 0, 0, -1, -1, -1, 0, 0, 0]).repeat(B, 1)
    labels = torch.randint(0, V, (B, T), generator=generator).masked_fill(side == 0, -100)
    return logits.requires_grad_(), teacher, labels, side


def positions() -> Tensor:
    return torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 0, 1, 2]).repeat(B, 1)


def plain(logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Rafailov et al., eq. 7, pair by pair, answer by answer."""

    def answer(of: Tensor, pair: int, tokens: range) -> Tensor:
        log_p = of[pair].log_softmax(-1)
        return torch.stack([log_p[t - 1, labels[pair, t]] for t in tokens]).sum()

    losses = []
    for pair in range(B):
        chosen, rejected = (
            answer(logits, pair, tokens) - answer(teacher, pair, tokens)
            for tokens in (range(2, 6), range(8, 11))
        )
        losses.append(-(BETA * (chosen - rejected)).sigmoid().log())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("slice_elements", [1, 5 * V, 2**24])
def test_value_and_gradient(slice_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token, "SLICE_ELEMENTS", slice_elements)
    logits, teacher, labels, side = inputs()
    loss = 0.7 * plain(logits, teacher, labels)
    (gradient,) = torch.autograd.grad(loss, logits)
    value = objectives.pair_backward(
        logits,
        objectives.next_targets(labels, positions()),
        side,
        {"dpo": 0.7},
        teacher=teacher,
        beta=BETA,
        count=B,
    )
    assert not value.requires_grad
    torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(logits.grad, gradient)


def test_micro_batches_with_a_common_count_equal_one_batch() -> None:
    logits, teacher, labels, side = inputs()
    targets = objectives.next_targets(labels, positions())

    def step(rows: slice) -> Tensor:
        return objectives.pair_backward(
            logits[rows], targets[rows], side[rows], {"dpo": 1.0}, teacher=teacher[rows], beta=BETA, count=B
        )

    whole = step(slice(0, B))
    gradient, logits.grad = logits.grad, None
    torch.testing.assert_close(step(slice(0, 1)) + step(slice(1, B)), whole)
    torch.testing.assert_close(logits.grad, gradient)


def test_the_teacher_itself_has_a_loss_of_log_two() -> None:
    logits, _, labels, side = inputs()
    value = objectives.pair_backward(
        logits,
        objectives.next_targets(labels),
        side,
        {"dpo": 1.0},
        teacher=logits.detach(),
        beta=BETA,
        count=B,
    )
    assert value == pytest.approx(0.6931471805599453)
