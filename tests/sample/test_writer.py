"""Rows that write one document after another say what the model says of each document alone."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from linearize.decode import Sampling
from linearize.kernels import dispatch
from linearize.sample.choice import Narrow
from linearize.sample.documents import documents
from linearize.sample.writer import Writer

OPENINGS = [[5], [11, 12, 13], [20, 21, 22, 23, 24], [30, 31]]
SIZES = np.array([len(ids) for ids in OPENINGS])
LENGTH, STEPS, ROWS = 14, 60, 3
"""The ring is gone round four times."""
FAMILIES = ("llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "starcoder2")
DRAWING = Narrow(True, 1.5, 40, 0.95)


def order(seed: int = 0, many: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).integers(len(OPENINGS), size=(ROWS, many))


def writer(model, sampling=DRAWING, ends=(2, 7, 8, 9), **options) -> Writer:
    made = Writer(
        model, ROWS, sampling, OPENINGS, ends=ends, length=LENGTH, steps=STEPS, capture=False, **options
    )
    made.prepare_order(50)
    return made


@pytest.mark.parametrize("triton", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_document_is_the_models_own(family, triton):
    """Greedy: every token behind an opening is the likeliest of an ordinary forward pass over its document alone."""
    if triton and family not in ("llama", "gemma2"):
        pytest.skip("the kernel is the same one")
    if triton and not (dispatch.interpreted() or torch.cuda.is_available()):
        pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device")
    device = "cuda" if triton and not dispatch.interpreted() else "cpu"
    model = tiny.model(family).to(device)
    # what greedy writes of the opening most often ends a document, so that some do
    made = writer(model, Sampling(), ends=(2,))
    with torch.no_grad():
        first = model(torch.tensor([OPENINGS[1]], device=device)).logits[0, -1].argmax()
    made.is_end[first] = True
    with dispatch.kernels("triton" if triton else "auto"):
        found = list(documents(made.write(order(), 0), order(), SIZES))
    assert len(found) > ROWS * STEPS / LENGTH and any(document.ended for document in found)
    assert sum(len(document.ids) for document in found) == ROWS * STEPS
    for document in found:
        ids = torch.from_numpy(document.ids.astype(np.int64))[None]
        opening = OPENINGS[document.opening]
        assert ids[0, : document.given].tolist() == opening[: ids.shape[1]]
        with torch.no_grad():
            logits = model(ids.to(device)).logits[0].cpu()
        likeliest = logits.argmax(-1)
        for place in range(document.given, ids.shape[1]):
            # two forms of one sum may differ in the last bit, which decides between equals only
            best, own = logits[place - 1].max(), logits[place - 1, ids[0, place]]
            assert own >= best - 1e-4, (place, likeliest)
        if document.ended:
            best, own = logits[-1].max(), logits[-1][made.is_end.cpu()].max()
            assert own >= best - 1e-4


def test_documents_are_cut_at_their_length():
    made = writer(tiny.model(), ends=())
    lengths = [len(document.ids) for document in documents(made.write(order(), 1), order(), SIZES)]
    whole, rest = divmod(STEPS, LENGTH)
    assert lengths == ROWS * [*([LENGTH] * whole), rest]


def test_a_round_is_a_function_of_its_seed_and_openings():
    """Whatever was written before, by this writer or another."""
    model = tiny.model()
    one, other = writer(model), writer(model)
    first = one.write(order(), 3)
    later = one.write(order(1), 4)
    assert np.array_equal(later, other.write(order(1), 4)) and np.array_equal(first, other.write(order(), 3))
    assert not np.array_equal(first, later)
    assert not np.array_equal(later, one.write(order(1), 5))


def test_the_callers_draws_stay_as_they_were():
    made = writer(tiny.model())
    torch.manual_seed(0)
    made.write(order(), 3)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


def test_the_attention_is_the_models_own_again():
    model = tiny.model()
    before, ids = model.config._attn_implementation, tiny.tokens()
    with torch.no_grad():
        logits = model(ids).logits
        writer(model).write(order(), 0)
        assert model.config._attn_implementation == before and torch.equal(model(ids).logits, logits)
