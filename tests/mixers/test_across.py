"""What goes to other processes is laid out as every backend takes it."""

import torch
from torch import Tensor

from linearize.across import even_gradient


class Collective(torch.autograd.Function):
    """Hears what its backward is handed, as that of a gathering is."""

    heard: list[bool] = []

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        Collective.heard.append(grad.is_contiguous())
        return grad


def test_gradients_that_are_gathered_are_contiguous():
    Collective.heard.clear()
    x, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 4, 3)
    for even in (lambda y: y, even_gradient):
        (even(Collective.apply(x)).mT * weight).sum().backward()
    assert Collective.heard == [False, True]
