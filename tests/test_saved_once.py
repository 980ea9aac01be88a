"""No backward of ours looks at its saved tensors twice: gradient checkpointing unpacks them once."""

from __future__ import annotations

import ast

import pytest
import torch
from compositions import SHAPES, Draw, make
from saved_once import unpacked_once
from test_import_order import modules
from torch.utils.checkpoint import checkpoint


def looks(tree: ast.AST) -> list[tuple[str, int]]:
    """Functions that read `saved_tensors`, and how often; what a loop does over and over counts twice."""
    found = []
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            again = {
                id(inner)
                for loop in ast.walk(function)
                if isinstance(loop, ast.For | ast.While)
                for line in loop.body
                for inner in ast.walk(line)
            }
            places = [
                node
                for node in ast.walk(function)
                if isinstance(node, ast.Attribute) and node.attr == "saved_tensors"
            ]
            if places:
                found.append((function.name, sum(1 + (id(node) in again) for node in places)))
    return found


def test_every_backward_reads_them_once():
    found = [
        (module, *function)
        for module, path in modules().items()
        for function in looks(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert len(found) >= 18  # those of kernels, which only a GPU or the interpreter runs, are among them
    assert [each for each in found if each[-1] > 1] == []


def test_it_counts():
    twice = "def backward(ctx):\n    a = ctx.saved_tensors\n    return [None] * len(ctx.saved_tensors)"
    looped = "def backward(ctx):\n    for i in range(2):\n        print(ctx.saved_tensors[i])"
    once = "def backward(ctx):\n    return [x for x in ctx.saved_tensors]"
    assert [looks(ast.parse(text)) for text in (twice, looped, once)] == [
        [("backward", 2)], [("backward", 2)], [("backward", 1)],
    ]  # fmt: skip


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * len(ctx.saved_tensors) + 0 * ctx.saved_tensors[0]


def test_a_second_look_shows():
    x = torch.ones(3, requires_grad=True)
    with unpacked_once():
        made = Twice.apply(x * 2).sum()
    with pytest.raises(AssertionError, match=r"twice, which torch\.utils\.checkpoint refuses"):
        made.backward()


def test_mesa_trains_under_checkpointing():
    """As stages with gradient_checkpointing do; its solution has a gradient of its own."""
    shape = SHAPES["grouped"]
    mixer = {
        "feature_map": {"name": "identity"}, "update": {"name": "mesa", "steps": 8}, "normalizer": {"name": "none"},
    }  # fmt: skip
    made = make(mixer, shape, torch.float64)
    gradients = []
    for saved in (True, False):
        x = Draw.of(shape, 20, torch.float64).apply(lambda y: y.requires_grad_())
        out = (
            x.run(made.chunked) if saved else checkpoint(lambda x=x: x.run(made.chunked), use_reentrant=False)
        )
        gradients.append(torch.autograd.grad(out.square().sum(), [*x.tensors[:3], *made.parameters()]))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)
