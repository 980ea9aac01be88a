"""A mixer that trains compiled is the mixer part by part, and all layers of a composition share what is compiled."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from linearize.kernels import dispatch
from linearize.mixers import LayerShape, build, compiled, shown
from linearize.mixers.base import PIECE, _in_pieces, summed

SHAPE = LayerShape(heads=2, kv_heads=1, key_dim=16, value_dim=16, scaling=0.25, model_dim=10)
WINDOW = {"name": "sliding", "size": 16, "first": 2, "overlap": True}
MIXERS = {
    "delta": {
        "feature_map": {"name": "identity"}, "gate": {"name": "mamba2"}, "update": {"name": "delta"},
        "normalizer": {"name": "none"}, "window": WINDOW, "combine": {"name": "sigmoid", "per": "token"},
    },
    "gdn2": {
        "short_conv": {"name": "depthwise", "roles": "qkv"}, "feature_map": {"name": "identity"},
        "gate": {"name": "kda", "rank": 3}, "update": {"name": "gdn2"}, "normalizer": {"name": "none"},
        "output": {"name": "gated_norm", "rank": 3},
    },
    "liger": {
        "feature_map": {"name": "softmax_dim"}, "gate": {"name": "key_pool"}, "normalizer": {"name": "none"},
        "window": WINDOW, "combine": {"name": "weighted"},
    },
    "levels": {
        "feature_map": {"name": "identity"}, "gate": {"name": "mamba2"}, "normalizer": {"name": "none"},
        "update": {"name": "log_linear_delta", "levels": 1, "block": 16},
    },
    "start and angles": {
        "feature_map": {"name": "identity"}, "gate": {"name": "mamba2"}, "normalizer": {"name": "none"},
        "update": {"name": "delta_product", "rank": 3, "start": True},
        "position": {"name": "selective_rope", "rank": 3},
    },
    "mlstm": {
        "feature_map": {"name": "identity"}, "gate": {"name": "scalar"}, "normalizer": {"name": "bounded"},
        "update": {"name": "mlstm", "start": True},
    },
    "mesa": {
        "feature_map": {"name": "identity"}, "gate": {"name": "mamba2"}, "normalizer": {"name": "none"},
        "update": {"name": "mesa", "steps": 1},
    },
    "softmax": {"window": {"name": "full", "log_base": 5.0}, "output": {"name": "norm"}},
}  # fmt: skip
MINUTES = ("delta", "gdn2", "levels", "start and angles", "mesa")
"""Of these, together, on Triton's interpreter."""


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    monkeypatch.setattr(
        compiled, "BACKEND", "aot_eager"
    )  # what is compiled, without the minute of a C++ compiler
    monkeypatch.setattr(compiled, "_made", {})


def trained(mixer, choice: str, monkeypatch, tokens: int = 20) -> list[Tensor | None]:
    """Output and gradients."""
    monkeypatch.setenv(compiled.VARIABLE, choice)
    generator = torch.Generator().manual_seed(1)
    sizes = {"q": (2, 16), "k": (1, 16), "v": (1, 16), "hidden": (10,)}
    given = {
        name: torch.randn(1, tokens, *size, generator=generator).requires_grad_()
        for name, size in sizes.items()
    }
    with dispatch.kernels("triton"):
        out = mixer.chunked(**given)
    weight = torch.randn(out.shape, generator=generator)
    wanted = [*given.values(), *mixer.parameters()]
    return [out, *torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True)]


@pytest.mark.skipif(not dispatch.interpreted(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow) if x in MINUTES else x for x in MIXERS]
)
def test_compiled_equals_the_parts(name, monkeypatch):
    mixers = [build(MIXERS[name], SHAPE) for _ in range(2)]
    torch._dynamo.utils.counters.clear()
    for mixer in mixers:
        expected, found = (trained(mixer, choice, monkeypatch) for choice in ("never", "always"))
        for one, two in zip(expected, found, strict=True):
            assert (one is None) == (two is None)
            if one is not None and two is not None:
                torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    (made,) = compiled._made.values()
    assert not made.failed
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "a graph for each layer"


@pytest.mark.skipif(not dispatch.interpreted(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("kind", ["cross_entropy", pytest.param("squares", marks=pytest.mark.slow)])
def test_what_compares_weights_is_compiled_too(kind, monkeypatch):
    """One graph for two layers, features and comparison in it."""
    gate = {"gate": {"name": "mamba2"}, "normalizer": {"name": "none"}} if kind == "squares" else {}
    mixers = [build({"feature_map": {"name": "hedgehog", "dim": 8}, **gate}, SHAPE) for _ in range(2)]
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 40, heads, 16, generator=generator) for heads in (2, 1, 1))
    starts = (torch.arange(40) == 13)[None]
    hidden = torch.randn(1, 40, 10, generator=generator)

    def rows(mixer, choice):
        monkeypatch.setenv(compiled.VARIABLE, choice)
        with dispatch.kernels("triton"):
            (term,) = shown.terms(mixer, kind, q, k, v, starts=starts, hidden=hidden)
            made = term()
        return [made, *torch.autograd.grad(made.sum(), list(mixer.parameters()))]

    torch._dynamo.utils.counters.clear()
    for mixer in mixers:
        for one, two in zip(rows(mixer, "never"), rows(mixer, "always"), strict=True):
            torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    (made,) = compiled._made.values()
    assert not made.failed and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(not dispatch.interpreted(), reason="needs TRITON_INTERPRET=1")
def test_what_cannot_be_compiled_runs_by_parts(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    mixer = build(MIXERS["liger"], SHAPE)
    expected = trained(mixer, "never", monkeypatch)
    with pytest.warns(UserWarning, match="could not be compiled"):
        found = trained(mixer, "always", monkeypatch)
    assert torch.equal(found[0], expected[0])


@pytest.mark.skipif(not dispatch.interpreted(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("most", [2, 6])
def test_sizes_beyond_what_is_compiled_run_by_parts(most, monkeypatch):
    """Whether we count them, or torch does, whose limit is three here."""
    monkeypatch.setattr(compiled, "SHAPES", most)
    mixer = build({"feature_map": {"name": "elu"}}, SHAPE)
    with torch._dynamo.config.patch(recompile_limit=3):
        for tokens in (17, 18, 19, 20, 21, 17):
            expected, found = (trained(mixer, choice, monkeypatch, tokens) for choice in ("never", "always"))
            torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    (made,) = compiled._made.values()
    assert not made.failed and len(made.kinds) == min(most, 3) and made.full == (most > 3)


def test_calls_with_and_without_documents_or_gradients_are_two_kinds():
    x = torch.zeros(2, 3)
    kinds = [(x, None), (x, x), (x.clone().requires_grad_(), None), (x.half(), None), (x, (None, x))]
    assert len({compiled._kind(kind) for kind in kinds}) == len(kinds)


def test_an_unknown_choice_is_refused(monkeypatch):
    monkeypatch.setitem(os.environ, compiled.VARIABLE, "alway")
    with pytest.raises(dispatch.KernelError, match="always"):
        compiled.wanted(torch.zeros(1))


def test_a_mixer_is_walked_once_and_a_change_of_dtype_or_branch_is_seen(monkeypatch):
    mixer, other = build(MIXERS["delta"], SHAPE), build(MIXERS["delta"], SHAPE)
    key = compiled._structure(mixer)
    assert key == compiled._structure(other)
    monkeypatch.setattr(type(mixer), "named_modules", lambda *_: pytest.fail("walked again"))
    assert compiled._structure(mixer) == key
    mixer.branch_off = "window"
    assert compiled._structure(mixer) != key
    mixer.branch_off = None
    half = mixer.to(torch.bfloat16)
    assert compiled._structure(half) != key


@pytest.mark.parametrize("tokens", [1, 32, 33, 100, 1100])
@pytest.mark.parametrize("rest", [(), (2, 3)])
def test_a_sum_over_a_text_is_compiled_in_short_pieces(tokens, rest):
    """Inductor gives longer ones to several programs and cannot write their code (torch 2.11); uncompiled it is one."""
    lengths: list[int] = []

    def look(graph, inputs):
        for node in graph.graph.nodes:
            if node.op == "call_method" and node.target == "cumsum":
                lengths.append(node.args[0].meta["example_value"].shape[node.args[1]])
        return graph.forward

    torch._dynamo.reset()
    values = torch.randn(2, tokens, *rest, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    made = torch.compile(lambda x: summed(x), backend=look, fullgraph=True, dynamic=False)(values)
    assert lengths and max(lengths) <= PIECE
    torch.testing.assert_close(made, values.cumsum(1), rtol=0, atol=1e-12)
    assert torch.equal(summed(values), values.cumsum(1))


@pytest.mark.parametrize("tokens", [33, 100, PIECE**2, PIECE**2 + 1, 3000])
def test_a_sum_in_pieces_is_the_sum(tokens):
    """As a GPU makes it without compiling, its gradient included."""
    values = torch.randn(2, tokens, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    values.requires_grad_()
    made, expected = _in_pieces(values), values.cumsum(1)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-12)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad((made * weights).sum(), values)
    torch.testing.assert_close(
        found, torch.autograd.grad((expected * weights).sum(), values), rtol=0, atol=1e-11
    )
