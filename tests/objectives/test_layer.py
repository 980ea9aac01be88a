"""Layer objectives: values and gradients against the formulas written out with ordinary autograd, in float64."""

from __future__ import annotations

import pytest
import torch
from quadratic import QuadraticCall, make_call
from torch import Tensor

from linearize import objectives

SCALE = 0.25


def expected(call: QuadraticCall, name: str) -> Tensor:
    """The objective's definition, without blocks and without shortcuts."""
    valid = torch.ones(2, 50, dtype=torch.bool) if call.valid is None else call.valid
    student, teacher = call.student(), call.teacher
    if name == "attention_output":
        return (student - teacher)[valid].square().mean()
    if name == "attention_output_projected":
        return (call.project(student) - call.project(teacher))[valid].square().mean()
    if name == "attention_output_relative":
        return (student - teacher)[valid].square().sum() / teacher[valid].square().sum()
    if name == "hidden_alignment":
        error = (call.project(student) - call.project(teacher))[valid]
        return (error.norm(dim=-1) / error.shape[-1] ** 0.5).mean()
    if name == "mixing_matrix":
        difference = (call.student_weights() - call.teacher_weights) * valid[:, None, :, None]
        return difference.square().sum((2, 3)).sqrt().mean()
    assert name == "attention_weights"
    log_student = call.student_weights().clamp_min(1e-12).log()
    per_query = -(call.teacher_weights * log_student).sum(dim=-1)  # [B, H, T]
    return per_query.transpose(1, 2)[valid].mean()


@pytest.mark.parametrize("name", objectives.names("layer"))
def test_value_and_gradient(call: QuadraticCall, name: str) -> None:
    loss = expected(call, name)
    (gradient,) = torch.autograd.grad(SCALE * 2.0 * loss, call.matrix)
    # the last term is of fewer columns
    call.at_once = 16
    value = objectives.layer_backward(call, {name: 2.0}, SCALE)
    assert not value.requires_grad
    torch.testing.assert_close(value.double(), 2.0 * loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(call.matrix.grad, gradient, rtol=1e-6, atol=1e-9)


def test_several_objectives_share_one_student(call: QuadraticCall) -> None:
    weights = {"attention_output": 3.0, "attention_output_projected": 0.5, "attention_weights": 0.1}
    (gradient,) = torch.autograd.grad(
        sum(w * expected(call, name) for name, w in weights.items()), call.matrix
    )
    call.students = 0
    objectives.layer_backward(call, weights)
    assert call.students == 1
    torch.testing.assert_close(call.matrix.grad, gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["attention_weights", "mixing_matrix"])
def test_in_one_term_and_in_many(name: str) -> None:
    whole, parts = make_call(padded=True), make_call(padded=True)
    value = objectives.layer_backward(whole, {name: 1.0})
    parts.at_once = 16
    torch.testing.assert_close(objectives.layer_backward(parts, {name: 1.0}), value)
    torch.testing.assert_close(parts.matrix.grad, whole.matrix.grad)
    # a norm's gradient wants the norm before the first of its terms
    assert (whole.made, parts.made) == ([0], [0, 16, 32, 48] * (2 if name == "mixing_matrix" else 1))


@pytest.mark.parametrize("name", ["mixing_matrix", "hidden_alignment"])
def test_a_norm_at_its_minimum_has_no_gradient(name: str) -> None:
    """The square root's slope there is infinite."""
    call = make_call(padded=True)
    call.matrix.data.copy_(torch.eye(8))
    assert objectives.layer_backward(call, {name: 1.0}) == 0
    assert call.matrix.grad.abs().max() == 0


def test_gradients_accumulate(call: QuadraticCall) -> None:
    objectives.layer_backward(call, {"attention_output": 1.0})
    once = call.matrix.grad.clone()
    objectives.layer_backward(call, {"attention_output": 1.0})
    torch.testing.assert_close(call.matrix.grad, 2 * once)


def test_padding_does_not_count() -> None:
    call = make_call(padded=True)
    before = {name: objectives.layer_backward(call, {name: 1.0}) for name in objectives.names("layer")}
    # Queries, keys and values at padding positions are anything at all.
    for tensor in (call.q, call.k, call.v):
        tensor[1, :7] = 50 * torch.randn(7, 3, 8, dtype=torch.float64)
    for name, value in before.items():
        torch.testing.assert_close(objectives.layer_backward(call, {name: 1.0}), value)
