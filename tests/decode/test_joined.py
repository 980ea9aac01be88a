"""Products of one input become one where the step is compiled; what they give stays what it was."""

from __future__ import annotations

import pytest
import torch
from decoding import devices
from torch import nn
from torch.nn import functional as F

from linearize.bench.subjects import convert, random_model
from linearize.decode import Decoder, joined
from linearize.decode.joined import MULTIPLE, Joining


def compiled(call, joining):
    torch._dynamo.reset()
    return torch.compile(call, backend=joining, dynamic=False, fullgraph=True)


def parameter(*size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(size))
    return nn.Parameter(torch.randn(size, generator=generator, dtype=dtype))


def count(graphs, target):
    return sum(node.target is target for graph in graphs for node in graph.graph.nodes)


class Eager:
    """Runs a graph as it is, and keeps it."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward


def test_linear_layers_and_matrices_of_one_input_are_one_product():
    weight, other, narrow, square = parameter(5, 8), parameter(3, 8), parameter(8, 2), parameter(8, 8)
    bias = parameter(3)

    def call(x):
        y = F.linear(x, weight), F.linear(x, other, bias), x.to(x.dtype) @ narrow, x @ square.T
        return (*y, F.linear(y[3], weight))

    with torch.no_grad():
        x, eager = torch.randn(2, 1, 8, dtype=torch.float64), Eager()
        joining = Joining(eager)
        made, expected = compiled(call, joining)(x), call(x)
        assert joining.joined == [4] and count(eager.graphs, F.linear) == 2
        for one, right in zip(made, expected, strict=True):
            assert one.is_contiguous() and one.shape == right.shape
            torch.testing.assert_close(one, right, rtol=1e-12, atol=1e-12)
        whole = next(x for x in eager.graphs[0].buffers() if x.dim() == 2)
        assert whole.shape == (2 * MULTIPLE, 8) and not whole[18:].any()


def test_a_parameter_of_another_dtype_is_copied_once():
    gate, maps = parameter(8, 2, dtype=torch.float32), parameter(3, 4, 4, dtype=torch.float32)
    weight = parameter(6, 8, dtype=torch.bfloat16)

    def call(x):
        y = torch.einsum("bhk,hkf->bhf", x[..., :4].expand(3, 3, 4), maps.to(torch.bfloat16))
        return F.linear(x, weight), x @ gate.to(torch.bfloat16), y

    with torch.no_grad():
        x, eager = torch.randn(3, 1, 8).bfloat16(), Eager()
        joining = Joining(eager)
        made = compiled(call, joining)(x)
        assert joining.joined == [2] and not any(node.target == "to" for node in eager.graphs[0].graph.nodes)
        for one, right in zip(made, call(x), strict=True):
            torch.testing.assert_close(one, right)


def test_products_that_must_stay_alone():
    """Other inputs, other dtypes, matrices that are no parameters, and weights with rules of their own."""
    weight, other = parameter(5, 8), parameter(4, 8)

    class Odd(torch.Tensor):
        pass

    odd = nn.Parameter(other.detach().as_subclass(Odd))

    def call(x, given):
        return (
            F.linear(x, weight),
            F.linear(x + 1, other),
            F.linear(x, given),
            F.linear(x.float(), weight.float()),
        )

    with torch.no_grad():
        x, given, eager = torch.randn(2, 8, dtype=torch.float64), other.detach().clone(), Eager()
        joining = Joining(eager)
        made = compiled(call, joining)(x, given)
        assert joining.joined == [] and count(eager.graphs, F.linear) == 4
        for one, right in zip(made, call(x, given), strict=True):
            assert torch.equal(one, right)
        joining = Joining(eager)
        compiled(lambda x: (F.linear(x, weight), F.linear(x, odd)), joining)(x)
        assert joining.joined == []


def test_products_that_nobody_reads_stay_out():
    """As far as outputs and what is written into go: a compiler drops the rest, but no part of a product."""
    weight, other, third, fourth = parameter(5, 8), parameter(4, 8), parameter(3, 8), parameter(2, 8)

    def call(x, held):
        unread = F.linear(x, third)
        torch.cat([unread.transpose(0, 1), unread.mT * 2.0 - unread.neg().mT], 1).softmax(-1)
        held.copy_(F.linear(x, fourth))
        return F.linear(x, weight), F.linear(x, other).exp()

    with torch.no_grad():
        x, eager = torch.randn(3, 8, dtype=torch.float64), Eager()
        held, joining = torch.zeros(3, 2, dtype=torch.float64), Joining(eager)
        made, right = compiled(call, joining)(x, held), held.clone()
        expected = call(x, held)
        assert joining.joined == [3] and count(eager.graphs, F.linear) == 2
        torch.testing.assert_close((*made, right), (*expected, held), rtol=1e-12, atol=1e-12)


def test_copies_follow_parameters_that_change():
    weight, other = parameter(5, 8), parameter(3, 8)
    with torch.no_grad():
        x, joining = torch.randn(2, 8, dtype=torch.float64), Joining(Eager())
        call = compiled(lambda x: (F.linear(x, weight), F.linear(x, other)), joining)
        call(x)
        other.mul_(2)
        before = [held.clone() for held, _ in joining.copies]
        joining.refresh()
        assert [torch.equal(x, y[0]) for x, y in zip(before, joining.copies, strict=True)] == [True, False]
        torch.testing.assert_close(call(x)[1], F.linear(x, other))


def test_nothing_is_copied_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(joined, "_fits", lambda taken, constants: taken < 400)
    weight, other = parameter(5, 8), parameter(3, 8)
    with torch.no_grad():
        joining = Joining(Eager())
        compiled(lambda x: (F.linear(x, weight), F.linear(x, other)), joining)(torch.randn(2, 8).double())
    assert joining.joined == [] and joining.copies == []


@devices
@pytest.mark.parametrize("recipe", ["teacher", "xatl", "lizard"])
def test_a_model_decodes_as_it_does_without(recipe, device):
    """q, k, v and the mixer's own projections in one product, those into the MLP in another, of every layer."""
    layers = 2
    sizes = {"hidden_size": 64, "head_dim": 16, "num_hidden_layers": layers}
    model = convert(random_model(device, torch.float32, "tiny", **sizes), recipe)
    ids = torch.arange(18).view(2, 9).to(device)
    expected = Decoder(model, 2, length=32).generate(ids, None, 5)
    torch._dynamo.reset()
    decoder = Decoder(model, 2, length=32, compile={"backend": "aot_eager"} if device == "cpu" else {})
    assert torch.equal(decoder.generate(ids, None, 5), expected)
    assert decoder.obstacle is None
    # xatl: decays and the output's gate; lizard: a gate
    assert (
        decoder.compiled.joining.joined
        == {"teacher": [3, 2], "xatl": [5, 2], "lizard": [4, 2]}[recipe] * layers
    )
    with torch.no_grad():
        for projection in ("q_proj", "k_proj"):
            for name, weight in model.named_parameters():
                if projection in name:
                    weight.neg_()
        weight = model.get_submodule("model.layers.0.mlp.up_proj").weight
        weight.copy_(weight.flip(0))
    expected = Decoder(model, 2, length=32).generate(ids, None, 5)
    assert torch.equal(decoder.generate(ids, None, 5), expected)


def test_a_step_that_does_not_compile_joined_compiles_as_it_is(monkeypatch):
    def fails(self, graph, inputs):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(Joining, "_rewritten", fails)
    model = random_model("cpu", torch.float32, "tiny")
    torch._dynamo.reset()
    decoder = Decoder(model, 1, length=32, compile={"backend": "aot_eager"})
    decoder.prepare()
    assert decoder.obstacle is None and decoder.compiled.joining is None
