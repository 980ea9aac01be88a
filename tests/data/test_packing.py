"""What holds for packed sequences, whatever the documents."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from linearize.config.schema import DataConfig
from linearize.data import packed, packing
from linearize.errors import DataError

END = 2
EVERYTHING = 1 << 30


def flat(dataset, key: str) -> list[int]:
    return [int(value) for item in dataset for value in item[key]]


def random_texts(seed: int) -> list[str]:
    rng = random.Random(seed)
    words = ["a", "bc", "def", "é", "日本", "\n", "x" * 30]
    return [" ".join(rng.choices(words, k=rng.choice([1, 2, 5, 40]))) for _ in range(rng.randrange(3, 30))]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("length", [7, 16, 33])
def test_packing_loses_and_invents_nothing(tokenizer, jsonl, seed, length):
    texts = random_texts(seed)
    config = DataConfig(source=jsonl([{"text": text} for text in texts]), length=length)
    dataset = packed(tokenizer, config, tokens=EVERYTHING, seed=seed)
    wanted = {tuple(tokenizer(text)["input_ids"]) for text in texts if text.strip()}
    ids = flat(dataset, "input_ids")
    *found, tail = split(ids)
    assert {tuple(document) for document in found} <= wanted
    assert not tail or any(document[: len(tail)] == tuple(tail) for document in wanted)
    everything = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts if text.strip())
    assert len(ids) == everything // length * length == dataset.num_tokens


def split(ids: list[int]) -> list[list[int]]:
    """Documents of a token stream; the last one may be cut."""
    documents: list[list[int]] = [[]]
    for token in ids:
        if token == END:
            documents.append([])
        else:
            documents[-1].append(token)
    return documents


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("boundaries", [True, False])
def test_positions_and_labels(tokenizer, jsonl, seed, boundaries):
    source = jsonl([{"text": text} for text in random_texts(seed)])
    dataset = packed(
        tokenizer, DataConfig(source=source, length=16, boundaries=boundaries), tokens=400, seed=seed
    )
    before = END
    for item in dataset:
        ids, positions, labels = (item[key].tolist() for key in ("input_ids", "position_ids", "labels"))
        assert all(tensor.dtype == torch.int64 and tensor.shape == (16,) for tensor in item.values())
        for index, previous in enumerate([before, *ids[:-1]]):
            start = previous == END and boundaries
            if index == 0 or start:
                assert positions[index] == 0 and labels[index] == -100
            else:
                assert positions[index] == positions[index - 1] + 1
                assert labels[index] == ids[index]
        before = ids[-1]


def test_no_document_predicts_the_start_of_the_next(tokenizer, jsonl):
    dataset = packed(tokenizer, DataConfig(source=jsonl([{"text": "ab"}] * 9), length=27), tokens=27, seed=0)
    ids, labels = dataset[0]["input_ids"], dataset[0]["labels"]
    scored = labels[1:] != -100  # the model shifts: position t predicts label t + 1
    assert not scored[ids[:-1] == END].any()
    assert scored[ids[:-1] != END].all()


def test_the_seed_fixes_the_order(tokenizer, jsonl):
    config = DataConfig(source=jsonl([{"text": f"document {i}"} for i in range(50)]), length=20)

    def ids(seed: int) -> list[int]:
        return flat(packed(tokenizer, config, tokens=200, seed=seed), "input_ids")

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


def test_a_larger_budget_starts_with_the_same_tokens(tokenizer, jsonl):
    config = DataConfig(source=jsonl([{"text": f"document {i}"} for i in range(50)]), length=20)
    small, large = (flat(packed(tokenizer, config, tokens=n, seed=3), "input_ids") for n in (60, 300))
    assert large[: len(small)] == small


@pytest.mark.parametrize(("tokens", "sequences"), [(1, 1), (16, 1), (17, 2), (160, 10)])
def test_the_budget_is_rounded_up_to_whole_sequences(tokenizer, jsonl, tokens, sequences):
    config = DataConfig(source=jsonl([{"text": "word " * 100}]), length=16)
    assert len(packed(tokenizer, config, tokens=tokens, seed=0)) == sequences


def test_only_what_the_budget_needs_is_tokenized(tokenizer, jsonl, monkeypatch):
    read = 0
    encode = packing.Tokens.__call__

    def counted(self, texts):
        nonlocal read
        read += sum(map(len, texts))
        return encode(self, texts)

    monkeypatch.setattr(packing.Tokens, "__call__", counted)
    config = DataConfig(source=jsonl([{"text": "word " * 40}] * 5000), length=16)  # a million characters
    packed(tokenizer, config, tokens=160, seed=0)
    assert read < 10_000


def test_a_long_document_is_tokenized_in_stretches_of_one_document(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "PIECE", 50)
    text = "some words and\nlines " * 30 + "y" * 120
    path = tmp_path / "book.txt"
    path.write_text(text)
    dataset = packed(tokenizer, DataConfig(source=str(path), length=len(text) + 1), tokens=1, seed=0)
    assert dataset[0]["input_ids"].tolist() == [*tokenizer(text)["input_ids"], END]
    assert dataset[0]["position_ids"].tolist() == list(range(len(text) + 1))


@pytest.mark.parametrize("text", ["", "short", "a b" * 40, "z" * 200, "\n" * 90, " x" * 60])
def test_stretches_join_to_the_text(text, monkeypatch):
    monkeypatch.setattr(packing, "PIECE", 50)
    stretches = list(packing._stretches(text))
    assert "".join(stretches) == text
    assert all(len(stretch) <= 50 for stretch in stretches)


def test_text_that_already_ends_is_not_ended_twice(tokenizer, jsonl):
    config = DataConfig(source=jsonl([{"text": "ab</s>"}] * 4), template="rendered", length=12)
    dataset = packed(tokenizer, config, tokens=12, seed=0)
    assert flat(dataset, "input_ids").count(END) == 4


def test_text_that_already_begins_is_not_begun_twice(tokenizer, jsonl):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    for template in ("rendered", "none"):
        config = DataConfig(source=jsonl([{"text": "<s>ab"}] * 4), template=template, length=16)
        ids = flat(packed(tokenizer, config, tokens=16, seed=0), "input_ids")
        assert ids[0] == 1 and (template == "none") == (ids[1:4] == tokenizer.convert_tokens_to_ids([*"<s>"]))


def test_plain_text_cannot_end_a_document(tokenizer, jsonl, caplog):
    caplog.set_level("INFO", logger="linearize")
    config = DataConfig(source=jsonl([{"text": "a</s>b<|user|>"}] * 4), length=60)
    (item,) = packed(tokenizer, config, tokens=60, seed=0)
    assert (item["input_ids"] == END).sum() == (item["position_ids"] == 0).sum() == 4
    assert tokenizer.decode(item["input_ids"]) == "a</s>b<|user|></s>" * 4
    assert "spells '</s>', which is read as text" in caplog.text and "data.template=rendered" in caplog.text
    rows = [{"instruction": "a</s>", "output": "b</s>"}] * 4
    ids = flat(
        packed(tokenizer, DataConfig(source=jsonl(rows), template="alpaca", length=100), tokens=400, seed=0),
        "input_ids",
    )
    assert ids.count(END) == len(tokenizer.decode(ids).split("### Response:\nb</s></s>")) - 1


def test_rendered_text_keeps_its_control_tokens(tokenizer, jsonl, caplog):
    caplog.set_level("INFO", logger="linearize")
    config = DataConfig(source=jsonl([{"text": "<|user|>a</s>b"}] * 4), template="rendered", length=20)
    (item,) = packed(tokenizer, config, tokens=20, seed=0)
    assert (item["input_ids"] == END).sum() == 8 and (item["position_ids"] == 0).sum() == 4
    assert "spells" not in caplog.text


def test_a_tokenizer_that_opens_texts_opens_documents(tokenizer, jsonl):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    config = DataConfig(source=jsonl([{"text": "ab"}] * 4), length=16)
    ids = flat(packed(tokenizer, config, tokens=16, seed=0), "input_ids")
    assert ids == [1, *tokenizer("ab", add_special_tokens=False)["input_ids"], END] * 4


def test_a_tokenizer_without_an_end_token(tokenizer, jsonl):
    tokenizer.eos_token = None
    config = DataConfig(source=jsonl([{"text": "abcd"}] * 4), length=16)
    item = packed(tokenizer, config, tokens=16, seed=0)[0]
    assert (item["position_ids"] == 0).nonzero().flatten().tolist() == [0, 4, 8, 12]


def test_too_little_text(tokenizer, jsonl):
    config = DataConfig(source=jsonl([{"text": "abc"}]), length=64)
    with pytest.raises(
        DataError, match="the text has 4 tokens, fewer than one sequence of 64; give more text or lower"
    ):
        packed(tokenizer, config, tokens=64, seed=0)


def test_no_tokenizer(jsonl):
    with pytest.raises(DataError, match="the model has no tokenizer"):
        packed(None, DataConfig(source=jsonl([{"text": "abc"}])), tokens=64, seed=0)


def test_prompts_carry_no_label(tokenizer, jsonl):
    rows = [{"instruction": "Add.", "input": f"{i}", "output": f"answer {i}"} for i in range(6)]
    config = DataConfig(source=jsonl(rows), template="alpaca", length=400)
    dataset = packed(tokenizer, config, tokens=EVERYTHING, seed=0)
    labels = [label for label in flat(dataset, "labels") if label != -100]
    answers = "".join(tokenizer.decode(labels).split("</s>"))
    assert set(answers.split("answer ")[1:]) <= set("012345")
    assert answers.startswith("answer ")


def test_sequences_of_nothing_but_prompt_are_left_out(tokenizer, jsonl):
    rows = [{"prompt": "p" * 200, "response": "yes"}] * 3
    dataset = packed(
        tokenizer, DataConfig(source=jsonl(rows), template="chat", length=32), tokens=EVERYTHING, seed=0
    )
    assert 1 <= len(dataset) <= 6
    assert all((item["labels"] != -100).any() for item in dataset)


def test_nothing_but_prompts(tokenizer, jsonl):
    rows = [{"prompt": "p" * 200, "response": "yes"}]
    config = DataConfig(source=jsonl(rows), template="chat", length=150)
    with pytest.raises(DataError, match=r"the prompts fill them all: raise data\.length"):
        packed(tokenizer, config, tokens=150, seed=0)


def test_items_do_not_share_memory(tokenizer, jsonl):
    dataset = packed(
        tokenizer, DataConfig(source=jsonl([{"text": "abc " * 20}]), length=16), tokens=16, seed=0
    )
    dataset[0]["input_ids"].zero_()
    assert dataset[0]["input_ids"].any()
    assert isinstance(np.asarray(dataset[0]["labels"]), np.ndarray)


def test_validation_reads_the_held_out_text(tokenizer, jsonl):
    config = DataConfig(
        source=jsonl([{"text": "a" * 40}], "train.jsonl"),
        validation=jsonl([{"text": "b" * 40}], "held.jsonl"),
        length=8,
    )
    train, held = (
        packed(tokenizer, config, tokens=8, seed=0, split=split) for split in ("train", "validation")
    )
    assert tokenizer.decode(train[0]["input_ids"]) == "a" * 8
    assert tokenizer.decode(held[0]["input_ids"]) == "b" * 8
