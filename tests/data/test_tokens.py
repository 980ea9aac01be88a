"""Text that spells a control token, through tokenizers of every kind."""

from __future__ import annotations

import random

import pytest
import tokenizers_of_all_kinds as kinds

from linearize.data.control import ControlTokens
from linearize.data.document import Document
from linearize.data.tokens import Tokens

WORDS = ["one", "two", "three", "<", ">", "/", "s", "<tool>", "<un", "k>", "unknown: é", "mask", "  "]


@pytest.fixture(params=kinds.ALL.values(), ids=kinds.ALL)
def tokenizer(request):
    return request.param()


@pytest.fixture(params=kinds.FAST.values(), ids=kinds.FAST)
def fast(request):
    return request.param()


def spelling(tokenizer) -> str:
    """The text that spells each of its control tokens."""
    text = kinds.TEXT
    for plain, own in zip(kinds.CONTROL, control(tokenizer), strict=True):
        text = text.replace(plain, own)
    return text


def control(tokenizer) -> list[str]:
    return [tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.mask_token]


def test_a_spelled_control_token_is_text(tokenizer):
    text = spelling(tokenizer)
    asked = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert set(tokenizer.convert_tokens_to_ids(control(tokenizer))) & set(asked), "it would be one"
    (ids,) = Tokens(tokenizer)([text])
    found = set(tokenizer.convert_ids_to_tokens(ids)) & set(control(tokenizer))
    if tokenizer.get_vocab().keys() >= {"a", "z"}:  # a word-level vocabulary knows only some words
        assert not found
        assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "").lower()
    else:
        assert found <= {tokenizer.unk_token}
        assert len(ids) == len(text.split())


def test_other_text_is_read_as_ever(tokenizer):
    encode = Tokens(tokenizer)
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 12))) for _ in range(200)]
    plain = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if encode.control.spelled("".join(texts)) is None:
        assert encode(texts) == plain
    assert encode.written(texts) == plain
    assert [encode.control.plain(text) or found for text, found in zip(texts, plain, strict=True)] == plain


def test_the_tokenizer_is_left_as_it_was(tokenizer):
    text = spelling(tokenizer)
    before = tokenizer(text)["input_ids"]
    Tokens(tokenizer)([text])
    assert tokenizer(text)["input_ids"] == before
    assert Tokens(tokenizer).written([text])[0] == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_marks_tell_mentioned_control_tokens_from_meant_ones(fast):
    """A text with both: as if the mentioned ones were a word that is no control token, and the others were there."""
    encode, end = Tokens(fast), fast.eos_token
    marks = encode.control
    marked = f"one {marks.mark(end)} two{end} {marks.mark(f'{end}x')}"
    assert marks.unmark(marked) == f"one {end} two{end} {end}x"
    (ids,) = encode.written([marked])
    assert ids.count(fast.eos_token_id) == 1
    spelled = encode([f"one {end} two"])[0]
    assert ids[: ids.index(fast.eos_token_id)] == spelled
    assert encode.written([marks.unmark(marked)])[0].count(fast.eos_token_id) == 3


def test_marks_without_a_copy_of_the_tokenizer():
    slow = kinds.Slow()
    encode = Tokens(slow)
    (ids,) = encode.written([f"one {encode.control.mark('</s>')}</s>"])
    assert slow.convert_ids_to_tokens(ids) == [*"one ", *"</s>", "</s>"]


def test_marks_go_through_messages_but_not_roles():
    marks = ControlTokens(kinds.byte_bpe())
    value = {"role": "<s>", "content": "a<s>", "tool_calls": [{"arguments": {"x": "</s>"}, "n": 3}]}
    marked = marks.mark(value)
    assert marked["role"] == "<s>" and marked["content"] != "a<s>"
    assert marks.unmark(marked["content"]) == "a<s>"
    assert marks.unmark(marked["tool_calls"][0]["arguments"]["x"]) == "</s>"
    assert marks.mark("nothing") == "nothing" and marks.unmark("nothing") == "nothing"
    assert marks.unmark(marks.mark("\ufdd0\ufdd1<s>")) == "\ufdd1<s>", "a text cannot bring marks of its own"


def test_the_longest_control_token_is_meant():
    tokenizer = kinds.byte_bpe()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<s>!", "<s>!!"]})
    encode = Tokens(tokenizer)
    assert encode.control.spelled("a<s>!! b") == "<s>!!"
    (ids,) = encode.written([encode.control.mark("<s>!!") + "<s>!"])
    assert tokenizer.convert_ids_to_tokens(ids) == [*"<s>!!", "<s>!"]


def test_an_ordinary_character_that_serves_as_a_special_token_stays_text():
    tokenizer = kinds.unigram()
    tokenizer.pad_token = "a"
    assert Tokens(tokenizer)(["banana </s>"])[0].count(tokenizer.pad_token_id) == 3


def test_added_tokens_that_are_not_special_stay():
    tokenizer = kinds.unigram()
    (ids,) = Tokens(tokenizer)(["</s><tool>"])
    assert tokenizer.convert_tokens_to_ids("<tool>") in ids and tokenizer.eos_token_id not in ids


def test_a_document_in_one_go_or_in_parts(tokenizer):
    encode, end = Tokens(tokenizer), tokenizer.eos_token
    plain = Document(((f"one{end}", False), ("two", True)))
    assert encode.document(plain) == encode([plain.text])[0]
    assert encode.parts(plain) == encode([f"one{end}", "two"])
    rendered = Document.rendered(f"one{end}")
    assert encode.document(rendered) == encode.parts(rendered)[0] == encode.written([f"one{end}"])[0]
    if end == "</s>" and not isinstance(tokenizer, kinds.Slow):
        assert encode.document(rendered)[-1] == tokenizer.eos_token_id != encode([f"one{end}"])[0][-1]
