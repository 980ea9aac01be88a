"""Sources mixed by weight: exact, even, seeded, and read again where they are short."""

from __future__ import annotations

import numpy as np
import pytest

from linearize.config.schema import DataConfig
from linearize.data import packed
from linearize.data.mixing import shares
from linearize.errors import RecipeError

LENGTH = 16


@pytest.fixture
def files(jsonl):
    """One letter each: whose sequence it is shows."""
    return {
        letter: jsonl([{"text": f"{letter * 9}{i:03d}"} for i in range(rows)], f"{letter}.jsonl")
        for letter, rows in (("a", 400), ("b", 400), ("c", 6))
    }


def letters(tokenizer, dataset) -> list[str]:
    found = []
    for item in dataset:
        text = tokenizer.decode(item["input_ids"])
        found.append(max("abc", key=text.count))
    return found


def mix(files, weights) -> DataConfig:
    return DataConfig(mix={files[letter]: weight for letter, weight in weights.items()}, length=LENGTH)


def test_shares_are_exact_and_even(tokenizer, files):
    config = mix(files, {"a": 5, "b": "3", "c": {"weight": 2}})
    dataset = packed(tokenizer, config, tokens=200 * LENGTH, seed=0)
    found = letters(tokenizer, dataset)
    assert len(dataset) == 200 and dataset.num_tokens == 200 * LENGTH
    assert [found.count(letter) for letter in "abc"] == [100, 60, 40]
    for start in range(0, 200, 20):
        stretch = found[start : start + 20]
        assert all(abs(stretch.count(x) - n) <= 1 for x, n in zip("abc", (10, 6, 4), strict=True))


def test_the_order_is_the_seeds(tokenizer, files):
    config = mix(files, {"a": 1, "b": 1})

    def ids(seed):
        dataset = packed(tokenizer, config, tokens=50 * LENGTH, seed=seed)
        return np.stack([item["input_ids"].numpy() for item in dataset])

    assert np.array_equal(ids(3), ids(3)) and not np.array_equal(ids(3), ids(4))


def test_a_short_source_is_gone_over_again(tokenizer, files):
    dataset = packed(tokenizer, mix(files, {"a": 1, "c": 1}), tokens=80 * LENGTH, seed=0)
    own = [
        tuple(item["input_ids"].tolist()) for item in dataset if "c" in tokenizer.decode(item["input_ids"])
    ]
    different = len(set(own))
    assert len(own) == 40 and different < 6
    turns = [own[start : start + different] for start in range(0, 40 - different + 1, different)]
    assert all(len(set(turn)) == different for turn in turns), "every sequence once in each turn"
    assert len(set(map(tuple, turns))) > 1, "in another order"


def test_an_item_hangs_on_its_place_alone(tokenizer, files):
    """A resumed run, or another worker, asks in another order."""
    dataset = packed(tokenizer, mix(files, {"a": 1, "c": 2}), tokens=60 * LENGTH, seed=1)
    forward = [dataset[i]["input_ids"].tolist() for i in range(60)]
    fresh = packed(tokenizer, mix(files, {"a": 1, "c": 2}), tokens=60 * LENGTH, seed=1)
    assert [fresh[i]["input_ids"].tolist() for i in reversed(range(60))] == forward[::-1]


def test_each_source_is_read_in_its_own_way(tokenizer, files, jsonl):
    rows = [{"prompt": "who?", "response": "c" * 12}] * 20
    config = mix(files, {"a": 1})
    config.mix[jsonl(rows, "chat.jsonl")] = {"weight": 1, "template": "chat"}
    dataset = packed(tokenizer, config, tokens=20 * LENGTH, seed=0)
    texts = [tokenizer.decode(item["input_ids"]) for item in dataset]
    assert sum("a" in text for text in texts) == 10
    assert sum("ccc" in text for text in texts) == 10 and any("<|bot|>" in text for text in texts)


def test_all_that_is_missing_is_said_at_once(tokenizer, files, tmp_path):
    config = mix(files, {"a": 1})
    config.mix |= {str(tmp_path / "b.jsnl"): 1, str(tmp_path / "nothing"): 1, "buitin": 1}
    with pytest.raises(RecipeError) as caught:
        packed(tokenizer, config, tokens=10 * LENGTH, seed=0)
    said = str(caught.value)
    assert "3 problems" in said and f"did you mean '{tmp_path / 'b.jsonl'}'" in said
    assert "did you mean 'builtin'" in said and str(tmp_path / "nothing") in said


def test_shares():
    assert shares([1, 1, 1], 10) == [4, 3, 3]
    assert shares([0.5, 0.3, 0.2], 10) == [5, 3, 2]
    assert shares([1e9, 1e-9], 7) == [7, 0]
    for total in range(50):
        assert sum(shares([0.21, 0.33, 0.46], total)) == total
