"""Templates: the text that a row becomes, and which of it is trained on."""

from __future__ import annotations

import pytest

from linearize.data import load_texts
from linearize.errors import DataError


def parts(source, **options) -> list[tuple]:
    return [document.parts for document in load_texts(source, **options)]


def test_alpaca(jsonl):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say {hi}.", "input": "", "output": "hi"},
        {"instruction": "Nothing.", "output": ""},
        {"instruction": "No input.", "output": "fine"},
    ]
    with_input, without, absent = parts(jsonl(rows), template="alpaca")
    assert [loss for _, loss in with_input] == [False, True]
    assert with_input[0][0].endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert with_input[1][0] == "3"
    assert "### Input" not in without[0][0] + absent[0][0]
    assert "Say {hi}." in without[0][0]


def test_alpaca_needs_its_columns(jsonl):
    with pytest.raises(
        DataError, match=r"no column 'output', which template 'alpaca' reads: did you mean 'outputs'"
    ):
        load_texts(jsonl([{"instruction": "a", "outputs": "b"}]), template="alpaca")


def test_chat_trains_on_every_answer(tokenizer, jsonl):
    chat = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "unanswered"},
    ]
    (found,) = parts(jsonl([{"messages": chat}]), template="chat", tokenizer=tokenizer)
    assert found == (
        ("<|user|>one\n<|bot|>", False),
        ("1</s>\n", True),
        ("<|user|>two\n<|bot|>", False),
        ("2</s>", True),
    )


def test_chat_of_prompt_and_response(tokenizer, parquet):
    source = parquet({"prompt": ["q"], "response": ["a"]})
    assert parts(source, template="chat", tokenizer=tokenizer) == [
        (("<|user|>q\n<|bot|>", False), ("a</s>", True))
    ]


def test_chat_in_a_column_of_another_name(tokenizer, parquet):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    source = parquet({"conversation": [chat, chat[:1]], "prompt": ["x", "x"]})
    found = parts(source, template="chat", text_field="conversation", tokenizer=tokenizer)
    assert found == [(("<|user|>q\n<|bot|>", False), ("a</s>", True))]


def test_a_template_that_rewrites_earlier_turns_trains_on_the_last_answer(tokenizer, jsonl):
    tokenizer.chat_template = (  # only the last answer keeps its thoughts
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{% if loop.last %}<t>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    ).replace("{% if loop.last %}", "{% if loop.last and m['role'] == 'assistant' %}")
    chat = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    (found,) = parts(jsonl([{"messages": chat}]), template="chat", tokenizer=tokenizer)
    assert found == (("user:xassistant:xuser:xassistant:", False), ("x<t>", True))


def test_a_template_whose_prompt_does_not_lead_to_the_answer(tokenizer, jsonl):
    tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(DataError, match="cannot be told apart"):
        parts(jsonl([{"prompt": "q", "response": "a"}]), template="chat", tokenizer=tokenizer)


@pytest.mark.parametrize("messages", ["hello", [{"content": "no role"}], 3])
def test_messages_of_another_shape(tokenizer, jsonl, messages):
    with pytest.raises(DataError, match="must hold a list of messages, each with role and content"):
        parts(jsonl([{"messages": messages}]), template="chat", tokenizer=tokenizer)


def test_messages_that_the_template_refuses(tokenizer, jsonl):
    chat = [{"role": "robot", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(DataError, match="chat template refuses these messages: no such role"):
        parts(jsonl([{"messages": chat}]), template="chat", tokenizer=tokenizer)


def test_chat_needs_a_tokenizer_with_a_template(tokenizer, jsonl):
    source = jsonl([{"prompt": "q", "response": "a"}])
    with pytest.raises(DataError, match="needs the model's tokenizer"):
        load_texts(source, template="chat")
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="needs a tokenizer with a chat template"):
        load_texts(source, template="chat", tokenizer=tokenizer)


def test_chat_needs_its_columns(tokenizer, jsonl):
    with pytest.raises(DataError, match=r"no column 'messages' \(or 'prompt' and 'response'\)"):
        load_texts(jsonl([{"text": "a"}]), template="chat", tokenizer=tokenizer)
