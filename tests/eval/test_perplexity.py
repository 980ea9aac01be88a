"""Perplexity against a plain loop in float64, at odd sizes; what it refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel

import linearize.eval.perplexity as module
from linearize.config.schema import DataConfig
from linearize.data import Document, validation_documents
from linearize.errors import DataError
from linearize.eval.perplexity import perplexity, windows


def plain(model, ids: list[int], window: int) -> tuple[float, int]:
    """Mean NLL by the definition: one window, one token at a time."""
    total, tokens = 0.0, 0
    for start in range(0, len(ids) - window + 1, window):
        piece = torch.tensor(ids[start : start + window])
        with torch.no_grad():
            probabilities = model(input_ids=piece[None]).logits[0].softmax(-1)
        for position in range(1, window):
            total -= math.log(probabilities[position - 1, piece[position]].item())
            tokens += 1
    return total / tokens, tokens


@pytest.mark.parametrize(
    ("count", "window", "batch_size"), [(61, 7, 3), (64, 64, 8), (65, 2, 5), (100, 33, 1)]
)
def test_equals_a_plain_loop(model, tokenizer, story, monkeypatch, count, window, batch_size):
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 5 * len(tokenizer))  # slices that do not divide the window
    model = model.double()
    expected, tokens = plain(model, tokenizer(story(count))["input_ids"], window)
    found = perplexity(model, tokenizer, story(count), window=window, batch_size=batch_size)
    assert found.nll == pytest.approx(expected, rel=1e-12)
    assert found.value == float(found) == pytest.approx(math.exp(expected), rel=1e-12)
    assert (found.tokens, found.windows) == (tokens, count // window)
    assert set(found.to_dict()) == {"value", "nll", "tokens", "windows"}


def test_documents_are_joined_in_order(model, tokenizer, story):
    one, two = story(13), story(20)
    joined = perplexity(model, tokenizer, f"{one} {two}", window=11)
    assert perplexity(model, tokenizer, [one, two], window=11) == joined
    assert perplexity(model, tokenizer, [two, one], window=11) != joined


def test_only_needed_documents_are_tokenized(model, tokenizer, story):
    def texts():
        yield story(20)
        yield story(21)
        raise AssertionError("a third document was read")

    assert perplexity(model, tokenizer, texts(), window=10, max_windows=3).windows == 3


def test_fewer_windows_than_asked_for_are_used(model, tokenizer, story):
    assert perplexity(model, tokenizer, story(25), window=10, max_windows=50).windows == 2
    assert perplexity(model, tokenizer, story(25), window=10, max_windows=0).windows == 2


def test_windows_cut_once_serve_many_calls(model, tokenizer, story):
    ids = windows(tokenizer, story(50), window=8)
    assert ids.shape == (6, 8) and ids.dtype == torch.int64
    assert perplexity(model, tokenizer, ids, max_windows=4) == perplexity(
        model, tokenizer, story(50), window=8, max_windows=4
    )


def test_a_tokenizer_with_bos_gets_one_in_every_window(tokenizer, story):
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    ids = windows(tokenizer, story(21), window=8)
    assert ids.shape == (3, 8)
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    assert ids[:, 1:].flatten().tolist() == tokenizer(story(21), add_special_tokens=False)["input_ids"]


def test_a_text_that_spells_a_control_token_holds_its_characters(tokenizer, story):
    """A word of this vocabulary is a token, so characters that are no word come to the unknown token."""
    text = f"<eos> {story(9)} < eos > <bos>"
    assert tokenizer.eos_token_id in tokenizer(text)["input_ids"]
    ids = windows(tokenizer, text, window=8)
    assert tokenizer.eos_token_id not in ids
    rendered = windows(tokenizer, [Document.rendered(text)], window=8)
    assert rendered[0, 0] == tokenizer.eos_token_id and (rendered == tokenizer.eos_token_id).sum() == 1


def test_held_out_conversations_keep_the_control_tokens_of_the_template(tokenizer, tmp_path):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    rows = [{"prompt": "the cat <eos>", "response": "sat"}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(validation=str(tmp_path / "rows.jsonl"), template="chat")
    documents = validation_documents(config, tokenizer)
    ids = windows(
        tokenizer, documents, window=8
    )  # a row has eight tokens: three in place of the prompt's <eos>
    assert ids.shape == (3, 8) and ((ids == tokenizer.eos_token_id).sum(1) == 2).all()


def test_the_model_is_given_back_as_it_was(model, tokenizer, story):
    model.train()
    perplexity(model, tokenizer, story(30), window=10)
    assert model.training
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()


def test_autocast_and_meter(model, tokenizer, story):
    seen = []

    class Meter:
        def advance(self, n, **numbers):
            seen.append((n, numbers["perplexity"]))

    full = perplexity(model, tokenizer, story(40), window=10, batch_size=3, meter=Meter())
    assert [n for n, _ in seen] == [30, 10] and seen[-1][1] == pytest.approx(full.value)
    half = perplexity(model, tokenizer, story(40), window=10, autocast=torch.bfloat16)
    assert half.value != full.value and half.value == pytest.approx(full.value, rel=0.05)


def test_an_overflowing_perplexity_is_infinite(model, tokenizer, story):
    with torch.no_grad():
        model.model.norm.weight.mul_(1e6)
    assert perplexity(model, tokenizer, story(20), window=10).value == math.inf


@pytest.mark.parametrize(
    ("text", "window", "message"),
    [
        ("the cat", 10, r"text of 2 tokens is shorter than one window of 10.*at most 2"),
        ("", 10, r"text of 0 tokens: perplexity needs"),
        ("the cat sat", 1, r"window 1: a window holds at least 2 tokens"),
    ],
)
def test_too_little_text_is_refused(model, tokenizer, text, window, message):
    with pytest.raises(DataError, match=message):
        perplexity(model, tokenizer, text, window=window)


def test_no_text_at_all_is_refused(model, tokenizer):
    with pytest.raises(DataError, match="text of 0 tokens"):
        perplexity(model, tokenizer, [], window=4)


def test_a_window_beyond_learned_positions_is_refused(tokenizer, story):
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=16)
    )
    with pytest.raises(DataError, match=r"window 20 exceeds the model's 16 learned positions"):
        perplexity(model, tokenizer, story(40), window=20)
    assert perplexity(model, tokenizer, story(40), window=16).windows == 2
