"""Tokens to text as they come: never half a character, and in the end the text that the tokenizer gives at once."""

from __future__ import annotations

import random

import pytest
from byte_llama import byte_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from linearize.serve.answers import Answers, Names
from linearize.serve.scheduler import Score
from linearize.serve.text import BROKEN, Text

LINES = [
    "naïve – 日本語, Ελλάδα",
    "👩‍👩‍👧 and 🏳️‍🌈!",
    "plain",
    " a  b\n\n\tc ",
    "é" * 40,
    "\ufffd is a sign too",
]


def pieces(tokenizer, ids, stops=(), before=(), step=1) -> list[str]:
    text = Text(tokenizer, stops, before)
    made = [text.push(ids[first : first + step]) for first in range(0, len(ids), step)]
    return [*made, text.end()]


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: words begin with a sign, and what is no piece is bytes."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "▁b", "b"]
    core = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, [], byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("line", LINES)
def test_the_pieces_are_the_text(line, step):
    tokenizer = byte_tokenizer()
    made = pieces(tokenizer, tokenizer(line)["input_ids"], step=step)
    assert "".join(made) == line
    if BROKEN not in line:
        assert not any(BROKEN in piece for piece in made)


def test_bytes_of_words_with_a_sign_in_front():
    """The space in front of a word belongs to the text where something stands before it, and to nothing where not."""
    tokenizer = byte_fallback()
    word, other, tail = tokenizer.convert_tokens_to_ids(["▁a", "▁b", "b"])
    sign = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "日".encode()]
    ids = [word, *sign, tail, other, *sign, *sign, tail]
    assert pieces(tokenizer, ids) == ["a", "", "", "日", "b", " b", "", "", "日", "", "", "日", "b", ""]
    assert "".join(pieces(tokenizer, ids, before=[1, tail])) == " a日b b日日b"


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("make", [byte_tokenizer, byte_fallback])
def test_a_prompt_that_ends_within_a_character(make, whole):
    """The text begins with the character that it completes; nothing of it is lost, and nothing of the prompt's said."""
    tokenizer = make()
    if make is byte_fallback:
        tail, other = tokenizer.convert_tokens_to_ids(["b", "▁b"])
        first, *rest = (tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "日".encode())
    else:
        tail, other, first, *rest = tokenizer("b 日")["input_ids"]

    def made(before: list[int], ids: list[int]) -> str:
        text = Text(tokenizer, (), before, whole=whole)
        return "".join([*(text.push([token]) for token in ids), text.end()])

    behind = " b" if make is byte_fallback else " "
    assert made([tail, first], [*rest, tail, other]) == f"日b{behind}"
    assert made([tail, first, rest[0]], [rest[1], tail, other]) == f"日b{behind}"
    assert made([tail, first], [tail, other]) == f"b{behind}"
    assert made([tail, first, *rest], [tail, other]) == f"b{behind}"


def test_random_bytes_end_as_the_tokenizer_ends_them():
    tokenizer, dice = byte_tokenizer(), random.Random(0)
    for _ in range(50):
        ids = [dice.randrange(256) for _ in range(dice.randint(1, 200))]
        assert "".join(pieces(tokenizer, ids, step=dice.randint(1, 5))) == tokenizer.decode(ids)
        text = Text(tokenizer, whole=True)
        assert text.push(ids) == "" and text.end() == tokenizer.decode(ids)


def test_a_word_behind_control_tokens_keeps_its_space():
    tokenizer = byte_fallback()
    word, tail = tokenizer.convert_tokens_to_ids(["▁a", "b"])
    ids = [word, *[2] * 100, word, tail]
    assert "".join(pieces(tokenizer, ids)) == "a ab" == tokenizer.decode(ids, skip_special_tokens=True)


def test_control_tokens_are_no_text():
    tokenizer = byte_tokenizer()
    ids = [256, *tokenizer("ab")["input_ids"], 256, *tokenizer("c")["input_ids"], 257]
    assert pieces(tokenizer, ids) == ["", "a", "b", "", "c", "", ""]


@pytest.mark.parametrize("step", [1, 2, 100])
@pytest.mark.parametrize(
    "stops, kept",
    [
        (["cd"], "ab"),
        (["x", "cde", "cd"], "ab"),
        (["abx"], "abcdefabcdefabcx"),
        (["abcx"], "abcdefabcdef"),
        (["fab", "efa"], "abcd"),
        (["日"], "abcdefabcdefabcx"),
    ],
)
def test_stop_strings(stops, kept, step):
    tokenizer = byte_tokenizer()
    ids = tokenizer("abcdefabcdefabcx")["input_ids"]
    made = pieces(tokenizer, ids, stops, step=step)
    assert "".join(made) == kept
    text = Text(tokenizer, stops, whole=True)
    assert text.push(ids) + text.end() == kept


def test_nothing_behind_a_stop_and_nothing_that_may_become_one_is_handed_out():
    tokenizer = byte_tokenizer()
    text = Text(tokenizer, ["END"])
    assert text.push(tokenizer("a E")["input_ids"]) == "a "
    assert text.push(tokenizer("N")["input_ids"]) == "" and not text.stopped
    assert text.push(tokenizer("x EN")["input_ids"]) == "ENx "
    assert text.push(tokenizer("D more")["input_ids"]) == "" and text.stopped
    assert text.push(tokenizer("more")["input_ids"]) == "" and text.end() == ""


@pytest.mark.parametrize("kind", ["words", "controls", "bytes"])
def test_a_long_text_takes_constant_time_a_token(monkeypatch, kind):
    """Also where nothing comes of the tokens, or never a character."""
    tokenizer, longest = byte_tokenizer(), []
    decode = tokenizer.decode

    def counted(ids, **options):
        longest.append(len(ids))
        return decode(ids, **options)

    monkeypatch.setattr(tokenizer, "decode", counted)
    text = {"words": "word " * 400, "controls": "word", "bytes": BROKEN * 2000}[kind]
    ids = tokenizer("word " * 400)["input_ids"]
    ids = {"words": ids, "controls": [*ids[:4], *[256, 257] * 1000], "bytes": [0x80] * 2000}[kind]
    assert "".join(pieces(tokenizer, ids)) == text
    assert max(longest) < (200 if kind == "bytes" else 10)


def test_tokens_by_name_are_their_text():
    """The space in front of a word is the word's; tokens that are no whole character, or read alike, are numbers."""
    tokenizer = byte_fallback()
    names = Names(tokenizer)
    word, tail, half = tokenizer.convert_tokens_to_ids(["▁b", "b", "<0xE6>"])
    assert [names[token] for token in (word, tail, half)] == [" b", "b", f"token_id:{half}"]
    also = tokenizer.convert_tokens_to_ids("<0x62>")  # the byte of a b
    score = Score(word, -0.1, ((word, -0.1), (tail, -1.0), (also, -2.0), (half, -3.0), (half + 1, -4.0)))
    ids = [word, *(tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "日".encode()), tail]
    answers = Answers(False, "m", tokenizer, [[tail]])
    found = answers.piece(0, "", scores=[Score(token, -0.1, score.top) for token in ids])["choices"][0][
        "logprobs"
    ]
    assert found["text_offset"] == [0, 2, 2, 2, 3] and "".join(found["tokens"][::4]) == " bb"
    assert list(found["top_logprobs"][0].values()) == [-0.1, -1.0, -2.0, -3.0, -4.0], "none is lost"
