"""Nothing in a round of drafting, checking and taking back waits for the device: a round is one CUDA graph.

As in `test_no_reads`, rounds run on the meta device, in the torch forms and in the Triton kernels' registered shapes.
"""

from __future__ import annotations

import pytest
import torch
from on_device import META, OnDevice, no_autocast, to_meta

from linearize.bench.subjects import TEACHER, convert, random_model, subjects
from linearize.decode import Sampling
from linearize.decode.cache import tensors
from linearize.decode.speculator import Speculator
from linearize.kernels import dispatch

FEW = ("lolcats", "liger_gsa", TEACHER)
NAMES = [x if x in FEW else pytest.param(x, marks=pytest.mark.slow) for x in [*subjects(), TEACHER]]
"""Two seconds each; the rest is slow, levels of a text most of all."""
# as wide as the kernels take, and small otherwise
SIZES = {"hidden_size": 64, "head_dim": 64, "num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def without_autocast(monkeypatch):
    no_autocast(monkeypatch)


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", NAMES)
def test_of_every_recipe(name, sample, monkeypatch):
    """The model and the draft are of one recipe; nothing of their states moves."""
    model = convert(random_model("cpu", torch.bfloat16, "tiny", **SIZES), name)
    to_meta(model)
    sampling = Sampling(True, 0.7, 5, 0.9) if sample else Sampling()
    made = Speculator(model, model, 2, 3, sampling, eos=[2], length=16, tokens=8)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(dispatch, "use_triton", lambda *x: False)
        for side in (made.draft, made.model):
            side.start(torch.zeros(2, 1, dtype=torch.int64, device=META), None, None, 1)
        made.width = 97
        for triton in (False, True):
            patch.setattr(dispatch, "use_triton", lambda *x, triton=triton: triton)
            for side in (made.model, made.draft):
                side.newest = triton and side.keeps_softmax
            held = [tensors(side.cache) for side in (made.model, made.draft)]
            made.model.begin(), made.draft.begin()  # makes the copies, and tensors that layers share
            held[1] = tensors(made.draft.cache)
            with made._decoding(), OnDevice() as mode:
                made._round()
            assert triton == ("linearize" in mode.seen)
            for side, before in zip((made.model, made.draft), held, strict=True):
                after = tensors(side.cache)
                assert after.keys() == before.keys() and all(after[key] is before[key] for key in before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("ahead", [1, 4])
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", [*subjects(), TEACHER])
def test_every_recipe_is_captured(name, sample, ahead):
    """The graph gives the tokens of the same rounds one by one; the draft is of the same recipe, or the teacher."""
    model, draft = (
        convert(random_model("cuda", torch.bfloat16, "tiny", **SIZES), which).requires_grad_(False)
        for which in (name, TEACHER if ahead == 1 else name)
    )
    ids = torch.randint(97, (2, 150), generator=torch.Generator().manual_seed(0)).cuda()
    found = []
    for capture in (True, False):
        sampling = Sampling(True, 0.7, 5, 0.9) if sample else Sampling()
        made = Speculator(model, draft, 2, ahead, sampling, length=256, tokens=80, capture=capture)
        made.looks = False
        torch.manual_seed(1)
        found.append((made.generate(ids, None, 80), made.accepted.tolist(), made.rounds.tolist()))
        assert made.obstacle is None and (made.graph is not None) == capture
    assert torch.equal(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]
