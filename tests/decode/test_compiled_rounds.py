"""Forwards of a round compile, kernels included, and give the same tokens; what cannot be compiled is said."""

from __future__ import annotations

import pytest
import tiny
import torch

from linearize.bench.subjects import TEACHER, convert, random_model
from linearize.decode import Decoder, ahead
from linearize.decode.speculator import Speculator
from linearize.kernels import dispatch

SIZES = {"hidden_size": 64, "head_dim": 16, "num_hidden_layers": 2}
QUICK = (TEACHER, "gated_delta_window")
"""The model and its draft that are compiled at every change."""


@pytest.mark.skipif(not dispatch.interpreted(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    "names",
    [
        QUICK,
        *(pytest.param(x, marks=pytest.mark.slow) for x in [("lolcats", TEACHER), ("lawcat", "swa_sinks")]),
    ],
    ids="-".join,
)
def test_compiled_rounds_give_the_same_tokens(names, monkeypatch):
    """One graph each: the draft's token, the model's launch over all of them."""
    monkeypatch.setattr(ahead, "fits", lambda model, config: True)
    model, draft = (convert(random_model("cpu", torch.float32, "tiny", **SIZES), name) for name in names)
    ids, mask, _ = tiny.left_padded(length=5, pad=2)
    found, options = [], {"backend": "aot_eager", "fullgraph": True}
    with dispatch.kernels("triton"):
        for compiling in (None, options):
            made = Speculator(model, draft, 2, 2, length=9, tokens=4, compile=compiling)
            made.looks = False
            found.append((made.generate(ids % 97, mask, 4), made.rounds.tolist(), made.accepted.tolist()))
            assert made.obstacle is None
    assert torch.equal(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]
    for side in (made.model, made.draft):
        assert side.compiled.joining.joined, "projections have the same input in every layer"


def test_what_cannot_be_compiled_runs_as_it_is():
    def refuse(graph, inputs):
        raise RuntimeError("not today")

    model = random_model("cpu", torch.float32, "tiny", **SIZES)
    ids = tiny.tokens(2, 9) % 97
    right = Speculator(model, model, 2, 2, length=20, tokens=7).generate(ids, None, 7)
    made = Speculator(model, model, 2, 2, length=20, tokens=7, compile={"backend": refuse})
    assert torch.equal(made.generate(ids, None, 7), right)
    assert "not today" in made.obstacle


@pytest.mark.slow  # two minutes where kernels are interpreted; the GPU suite runs it
def test_every_size_is_compiled():
    """torch counts what it compiles by code, and stops at eight: a ninth batch would run operation by operation."""
    met = []

    def counting(graph, inputs):
        met[-1] += 1
        return graph

    model = random_model("cpu", torch.float32, "tiny", **SIZES)
    ids = tiny.tokens(10, 5) % 97
    for rows in range(1, 11):
        met.append(0)
        Decoder(model, rows, length=9, compile={"backend": counting}).generate(ids[:rows], None, 3)
    for ahead_by in range(1, 10):
        met.append(0)
        made = Speculator(model, model, 2, ahead_by, length=9, tokens=4, compile={"backend": counting})
        made.generate(ids[:2], None, 4)
        assert made.obstacle is None
    assert min(met[:10]) == 1 and min(met[10:]) >= 2, met


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["swa_sinks", "best_constant", "lolcats", TEACHER])
def test_compiled_rounds_are_captured(name):
    """By torch's own compiler, and the text is the one of steps that are not compiled."""
    model, draft = (
        convert(random_model("cuda", torch.float32, "tiny", **SIZES), which).requires_grad_(False)
        for which in (TEACHER, name)
    )
    ids = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(0)).cuda()
    made = Speculator(model, draft, 2, 3, length=80, tokens=30, compile={})
    found = made.generate(ids, None, 30)
    assert made.obstacle is None and made.graph is not None
    assert torch.equal(found, Decoder(model, 2, length=80).generate(ids, None, 30))
