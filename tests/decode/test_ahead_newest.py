"""Tokens ahead of a text read the keys that they see, without a mask; where these are not side by side, by one."""

from __future__ import annotations

import pytest
import tiny
import torch
from decoding import crossed, devices, hybrid

from linearize.decode import Decoder, ahead, newest, read_ids
from linearize.decode.speculator import Speculator
from linearize.kernels import dispatch

NEW = 12


@pytest.fixture(autouse=True)
def as_on_a_card(monkeypatch):
    monkeypatch.setattr(ahead, "fits", lambda model, config: True)


def of(family: str, layers, device: str):
    """A model and one that drafts for it, which is not always right."""
    model = tiny.model(family).to(device) if layers == "teacher" else hybrid(family, layers, device=device)
    return model, hybrid(family, [0], device=device) if layers == "teacher" else tiny.model(family).to(device)


def expected(model, ids, mask):
    made = Decoder(model, len(ids), length=64, newest=False, capture=False)
    return made.generate(ids, mask, NEW)


@devices
@crossed(["llama", "mistral", "gemma2", "gemma3"], {"[1, 2]": [1, 2], "teacher": "teacher"})
def test_gives_the_tokens_of_masks(family, layers, device, monkeypatch):
    """Padded prompts, sliding windows, soft caps, rows that take unequal numbers."""
    seen, attend = [], newest.newest_steps
    monkeypatch.setattr(newest, "newest_steps", lambda *x, **y: seen.append(x[0].shape[1]) or attend(*x, **y))
    model, draft = of(family, layers, device)
    made = Speculator(model, draft, 3, 3, pad=0, length=20 + NEW, tokens=NEW)
    for length in (20, 11):
        ids, mask, _ = (None if x is None else x.to(device) for x in tiny.left_padded(3, length=length))
        assert torch.equal(made.generate(ids, mask, NEW), expected(model, ids, mask))
    assert set(seen) == {1, 4}, "drafting one by one, checking all"


@pytest.mark.skipif(not dispatch.interpreted(), reason="needs TRITON_INTERPRET=1")
def test_in_the_kernel():
    model, draft = of("llama", [1, 2], "cpu")
    ids = tiny.tokens(2, 9)
    right = expected(model, ids, None)
    made = Speculator(model, draft, 2, 2, length=9 + NEW, tokens=NEW)
    with dispatch.kernels("triton"):
        assert torch.equal(made.generate(ids, None, NEW), right)


def test_behind_a_text_that_was_read():
    model, draft = of("llama", "teacher", "cpu")
    text, ids = tiny.tokens(1, 17), tiny.tokens(2, 6, seed=5)
    made = Speculator(model, draft, 2, 3, length=40, tokens=NEW)
    found = made.generate(ids, None, NEW, prefix=read_ids(model, text))
    assert torch.equal(found, expected(model, torch.cat([text.expand(2, -1), ids], 1), None))


@devices
def test_padding_between_tokens_is_left_to_masks(device):
    model, draft = of("llama", [1, 2], device)
    ids, mask, _ = (None if x is None else x.to(device) for x in tiny.left_padded(3, length=20))
    made = Speculator(model, draft, 3, 3, length=20 + NEW, tokens=NEW)
    assert torch.equal(made.generate(ids, mask, NEW), expected(model, ids, mask)) and made.model.newest
    mask[1, 12:15] = 0
    assert torch.equal(made.generate(ids, mask, NEW), expected(model, ids, mask)) and not made.model.newest


@pytest.mark.parametrize(("family", "fitting"), [("llama", True), ("gemma2", False)])
def test_a_cap_that_the_model_drops_is_not_computed_by_half(family, fitting, monkeypatch):
    """sdpa has no soft cap, and transformers before 5.18 drops it: so would the prompt, and `generate`."""
    monkeypatch.setattr(newest.dispatch, "use_triton", lambda *tensors: True)
    model = tiny.model(family)
    model.config._attn_implementation = "sdpa"
    assert newest.fits(model, model.config) == fitting


@pytest.mark.parametrize("error", [newest.UnknownScores, dispatch.KernelError, RuntimeError])
def test_scores_that_are_not_known_are_left_to_masks(error, monkeypatch):
    def unknown(*given, **named):
        raise error("sinks")

    monkeypatch.setattr(newest, "newest_steps", unknown)
    model, draft = of("llama", [1, 2], "cpu")
    ids = tiny.tokens(2, 9)
    made = Speculator(model, draft, 2, 3, length=9 + NEW, tokens=NEW)
    assert torch.equal(made.generate(ids, None, NEW), expected(model, ids, None))
    assert not made.model.newest and not made.draft.newest
