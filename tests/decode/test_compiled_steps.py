"""One token compiles, kernels included: operators that write in place are such that torch can compile them."""

from __future__ import annotations

import importlib
import pkgutil
from contextlib import nullcontext

import pytest
import tiny
import torch
from torch._higher_order_ops.auto_functionalize import can_auto_functionalize

from linearize import kernels
from linearize.bench.subjects import convert, random_model
from linearize.config import list_recipes
from linearize.decode import Decoder, compiling
from linearize.kernels import dispatch

SIZES = {"hidden_size": 64, "head_dim": 16, "num_hidden_layers": 2}
RECIPES = (
    "lolcats",
    "gated_delta_window",
    "lawcat",
    "radlads_rwkv7",
    "liger_gsa",
    "mamba_in_llama",
    "softmax",
)
"""Between them every operator that makes a token in place, and softmax layers, kept and run by a mixer."""
EVERY_RECIPE = [name for name, _ in list_recipes()]
WHOLE = ("inline", "mala", "best_constant", "best_hybrid")
"""Of them, what is traced at every change."""
QUICK = ("gated_delta_window",)
"""Of them, what is compiled at every change; the others take a minute and a half together."""


def writing() -> dict[str, torch._ops.OpOverload]:
    """Our operators that write into their arguments, by name."""
    pytest.importorskip("triton")
    for module in pkgutil.walk_packages(kernels.__path__, "linearize.kernels."):
        importlib.import_module(module.name)
    names = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("linearize::")
    }
    found = {name: getattr(torch.ops.linearize, name).default for name in names}
    return {name: operator for name, operator in found.items() if operator._schema.is_mutable}


def test_torch_compiles_every_operator_that_writes_in_place():
    found = writing()
    assert {"window_step", "short_conv_step", "window_linear_step", "gated_linear_step"} <= set(found)
    assert [name for name, operator in found.items() if not can_auto_functionalize(operator)] == []


@pytest.mark.skipif(not dispatch.interpreted(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    "recipe",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES],
)
def test_a_compiled_token_equals_one_that_is_not(recipe):
    model = convert(random_model("cpu", torch.float32, "tiny", **SIZES), recipe)
    ids, mask, _ = tiny.left_padded(length=9)
    ids = ids % 97
    options = {"backend": "aot_eager", "fullgraph": True}
    with dispatch.kernels("triton"):
        expected = Decoder(model, 2, length=32).generate(ids, mask, 4)
        decoder = Decoder(model, 2, length=32, compile=options)
        assert torch.equal(decoder.generate(ids, mask, 4), expected)
        assert decoder.compiled.joining.joined, "projections have the same input in every layer"


@pytest.mark.parametrize(
    "recipe",
    [name if name in WHOLE else pytest.param(name, marks=pytest.mark.slow) for name in EVERY_RECIPE],
)
def test_a_step_is_one_graph(recipe):
    """Where tracing ends, layers run by themselves, and behind the eighth operation by operation; torch says little."""
    graphs = []

    def look(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = convert(random_model("cpu", torch.float32, "tiny", **SIZES), recipe)
    decoder = Decoder(model, 2, length=64, compile={"backend": look})
    decoder.prepare()
    decoder.read(torch.arange(5, 21).view(2, 8), None)
    decoder.run(2)
    assert decoder.obstacle is None and len(graphs) == 1


@pytest.mark.skipif(not dispatch.interpreted(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("ordered", [True, False])
def test_what_reads_a_state_stays_before_what_writes_into_it(ordered, monkeypatch):
    """Else Inductor gives the kernel a copy of the state; it does so by itself, which shows that the check sees it."""
    moved, kernels_met = [], []

    def look(graph):
        late = set()
        for node in graph.nodes:
            if node.op == "call_function" and "auto_functionalized" in str(node.target):
                kernels_met.append(node)
                late |= set(node.kwargs["_all_bases"])
            elif node.op == "call_function" and node.target is not torch.ops.aten.copy_.default:
                moved.extend(x for x in node.all_input_nodes if x in late)
        raise RuntimeError("that is all")

    if not ordered:
        monkeypatch.setattr(compiling, "in_order", nullcontext)
    model = convert(random_model("cpu", torch.bfloat16, "tiny", **{**SIZES, "num_hidden_layers": 1}), "based")
    torch._dynamo.reset()
    with dispatch.kernels("triton"), torch._inductor.config.patch(post_grad_custom_post_pass=look):
        decoder = Decoder(model, 2, length=32, compile={})
        decoder.prepare()
    assert "that is all" in decoder.obstacle
    assert kernels_met and bool(moved) is not ordered
