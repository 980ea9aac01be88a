"""Recall tasks: the same items again, hand-checked texts, and toy models whose scores are known beforehand."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from byte_llama import byte_tokenizer
from torch import nn
from transformers import LlamaConfig

from linearize.errors import DataError
from linearize.eval import judge
from linearize.eval.cast import Entrant
from linearize.eval.measurement import Call, Setting
from linearize.eval.recall import mqar
from linearize.eval.recall.facts import PLACES, Facts
from linearize.eval.recall.haystack import Haystack
from linearize.eval.recall.item import DEPTHS, Item, Needle
from linearize.eval.recall.measure import GENERATORS, Mqar, Retrieval
from linearize.eval.recall.niah import NIAH
from linearize.eval.recall.passkey import passkey
from linearize.eval.recall.scoring import exact, recalled
from linearize.eval.recall.variables import variable_tracking
from linearize.eval.recall.words import uuid
from linearize.eval.suite import Unit


class Reader(nn.Module):
    """Sees the last `window` tokens and answers what `find` reads in them, one token after the other.

    Args:
        find: (visible text of the prompt, whole prompt) -> answer, or None where it is not seen.
    """

    def __init__(self, tokenizer, find, window: int | None = None) -> None:
        super().__init__()
        self.tokenizer, self.find, self.window = tokenizer, find, window
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = LlamaConfig(num_hidden_layers=1)

    def forward(self, input_ids, past_key_values, use_cache):
        if not hasattr(past_key_values, "ids"):
            past_key_values.ids, past_key_values.start = input_ids[:, :0], input_ids.shape[1]
        logits = torch.full((*input_ids.shape, len(self.tokenizer)), -20.0)
        for step in range(input_ids.shape[1]):
            past_key_values.ids = torch.cat([past_key_values.ids, input_ids[:, step : step + 1]], 1)
            for row, ids in enumerate(past_key_values.ids):
                made = len(ids) - past_key_values.start
                if made >= 0:
                    logits[row, step, self.next(ids[: past_key_values.start], made)] = 0.0
        return SimpleNamespace(logits=logits)

    def next(self, prompt, made: int) -> int:
        whole = self.tokenizer.decode(prompt)
        seen = whole if self.window is None else self.tokenizer.decode(prompt[-self.window :])
        answer = self.find(seen, whole) or "?" * 40
        ids = self.tokenizer(f" {answer}.")["input_ids"]
        return ids[made] if made < len(ids) else ids[-1]


def measured(task: str, model: nn.Module, length: int, **settings) -> dict:
    tokenizer = byte_tokenizer()
    unit = Unit(task, length, settings)
    setting = Setting(tokenizer, {}, Path("."))
    steps = []
    meter = SimpleNamespace(advance=lambda n: steps.append(n))
    tasks = {"mqar": Mqar()} if task == "mqar" else {task: Retrieval(task)}
    assert tasks[task].units(unit, setting) == [unit] and tasks[task].tokens(unit, setting) > 0
    rows = tasks[task].measure(
        model, Call(unit, Entrant("", "student", "", lambda: None), ""), setting, meter
    )
    assert sum(steps) == settings["items"] * length
    return {(row.metric, row.bucket): row for row in rows}


FIND = {
    "passkey": lambda seen, whole: _first(r"The pass key is (\d+)\. Remember", seen),
    "niah_single_1": lambda seen, whole: _asked(seen, whole),
    "niah_single_3": lambda seen, whole: _asked(seen, whole),
    "niah_multikey_1": lambda seen, whole: _asked(seen, whole),
    "niah_multikey_2": lambda seen, whole: _asked(seen, whole),
    "niah_multivalue": lambda seen, whole: _asked(seen, whole),
    "niah_multiquery": lambda seen, whole: _asked(seen, whole),
    "variable_tracking": lambda seen, whole: _chain(whole),
    "phonebook": lambda seen, whole: _first(
        re.escape(re.search(r"\n([A-Z]\w+ [A-Z]\w+):$", whole)[1]) + r": (\d+-\d+)", seen
    ),
}


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found[1] if found else None


def _asked(seen: str, whole: str) -> str | None:
    asked = re.search(
        r"What \D{2,7} the special magic \w+ for ([^?]+) mentioned in the provided text\?", whole
    )[1]
    keys = re.split(r", and |, ", asked)
    values = [value for key in keys for value in re.findall(rf"for {key} is: (\S+)\.", seen)]
    return ", ".join(values) or None


def _chain(whole: str) -> str | None:
    value = re.search(r"value (\d+) in the text above\. Answer: [^:]*:$", whole)[1]
    names = re.findall(rf"VAR (\w+) = {value}\.", whole)
    for name in names:
        names += re.findall(rf"VAR (\w+) = VAR {name}\.", whole)
    return ", ".join(names)


@pytest.mark.parametrize("task", FIND)
def test_a_perfect_memory_scores_everything(task):
    found = measured(task, Reader(byte_tokenizer(), FIND[task]), 1800, items=5)
    if ("exact", "") in found:
        assert found["exact", ""].value == 1.0
    assert found["recalled", ""].value == 1.0 and found["recalled", ""].high == 1.0
    assert found["choice", ""].value == 1.0
    assert found["answer_nll", ""].value < 1e-3


def test_a_window_scores_the_depths_that_it_holds():
    """A byte is a token here: of 1,200, the question takes the last 46, a needle 57; a window of 500 sees the rest."""
    window = 500
    found = measured("passkey", Reader(byte_tokenizer(), FIND["passkey"], window), 1200, items=20, depths=5)
    fixed = len(passkey(Random(0)).before) + len(passkey(Random(0)).after) + 1 + 57
    haystack = 1200 - fixed
    # a needle at a depth d begins (1 - d) * haystack before the question, give or take a sentence of 25 bytes
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        back = (1 - depth) * haystack + 46 + 57
        assert abs(back - window) > 25
        assert found["exact", f"{depth:.2f}"].value == (back < window)
        assert found["exact", f"{depth:.2f}"].n == 4
    held = sum((1 - d) * haystack + 46 + 57 < window for d in (0.0, 0.25, 0.5, 0.75, 1.0))
    assert found["exact", ""].value == held / 5 == 0.4


def test_nothing_remembered_scores_nothing():
    found = measured("niah_multikey_1", Reader(byte_tokenizer(), lambda *_: None), 1000, items=4)
    assert found["exact", ""].value == found["recalled", ""].value == found["choice", ""].value == 0
    assert found["exact", ""].high == pytest.approx(0.4899, abs=1e-3)  # of four items, Wilson's


def test_prompts_are_exactly_as_long_as_asked_for_and_the_same_again():
    tokenizer, one, two = byte_tokenizer(), Random(7), Random(7)
    haystack = Haystack(tokenizer)
    for task, generator in GENERATORS.items():
        prompts = [haystack.assemble(generator(r), 2000, r) for r in (one, two)]
        assert prompts[0].ids == prompts[1].ids and len(prompts[0].ids) == 2000, task
        item = prompts[0].item
        text = tokenizer.decode(prompts[0].ids)
        assert text.startswith(item.before) and text.endswith(item.after)
        assert all(needle.text in text for needle in item.needles)
        right, *wrong = (tokenizer.decode(ids) for ids in prompts[0].answers)
        assert right == f" {item.answer}" and len(wrong) == 3 and right not in wrong
    assert GENERATORS["passkey"](Random(1)) != GENERATORS["passkey"](Random(2))


def test_needles_are_drawn_at_rulers_depths():
    rulers = np.round(np.linspace(0, 100, num=40, endpoint=True)).astype(int) / 100
    assert rulers.tolist() == DEPTHS
    found = [
        needle.depth for seed in range(60) for needle in GENERATORS["niah_multivalue"](Random(seed)).needles
    ]
    assert set(found) == set(DEPTHS)


def test_needles_lie_at_their_depths():
    tokenizer = byte_tokenizer()
    item = Item(
        "<", (Needle("AAA.", 0.0), Needle("BBB.", 0.5), Needle("CCC.", 1.0)), ">", ("x",), ("y",), "noise"
    )
    text = tokenizer.decode(Haystack(tokenizer).assemble(item, 500, Random(0)).ids)
    assert text.startswith("< AAA. ") and text.endswith(" CCC.>")
    assert abs(text.index("BBB") - 250) < 25
    assert len(text) == 500 and re.sub(r" (AAA|BBB|CCC)\.", "", text).count("Here we go.") == 5
    with pytest.raises(DataError, match="has 17 tokens and does not fit into 16"):
        Haystack(tokenizer).assemble(item, 16, Random(0))


def test_the_end_of_a_cut_line_is_never_read_as_the_end_of_an_answer():
    tokenizer = byte_tokenizer()
    haystack = Haystack(tokenizer)
    for task in ("phonebook", "niah_multikey_2", "niah_multikey_3"):
        for number in range(40):  # as many cuts of the first line
            item = GENERATORS[task](Random(number), 0.0)
            ids = haystack.assemble(item, 1800 + number, Random(number)).ids
            text = tokenizer.decode(ids)
            assert len(ids) == 1800 + number and text.endswith(item.after)
            assert all(f"\n{needle.text}\n" in text for needle in item.needles), (task, number)


def test_rulers_tasks_hold_what_they_are_defined_by():
    made = {name: generator(Random(3)) for name, generator in NIAH.items()}
    counts = {name: (len(item.needles), len(item.answers)) for name, item in made.items()}
    assert counts == {
        "niah_single_1": (1, 1), "niah_single_2": (1, 1), "niah_single_3": (1, 1), "niah_multikey_1": (4, 1),
        "niah_multikey_2": (1, 1), "niah_multikey_3": (1, 1), "niah_multivalue": (4, 4), "niah_multiquery": (4, 4),
    }  # fmt: skip
    form = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")
    keys = {name: Counter(form.fullmatch(n.text)[2] for n in item.needles) for name, item in made.items()}
    assert set(keys["niah_multivalue"].values()) == {4} and len(keys["niah_multiquery"]) == 4
    assert re.fullmatch(r"\d{7}", made["niah_single_1"].answers[0])
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", made["niah_multikey_3"].answers[0])
    assert made["niah_single_1"].haystack == "noise" and made["niah_single_2"].haystack == "book"
    assert form.fullmatch(made["niah_multikey_3"].haystack(Random(0)))
    assert made["niah_single_1"].after.endswith("mentioned in the provided text is")
    assert re.fullmatch(r"[0-9a-f-]{14}4[0-9a-f]{3}-[89ab][0-9a-f-]{16}", uuid(Random(5)))


def test_a_chain_of_variables_has_four_hops():
    item = variable_tracking(Random(11))
    links = [needle.text for needle in item.needles]
    value = re.fullmatch(r"VAR (\w{5}) = (\d{5})\.", links[0])
    assert value[1] == item.answers[0] and value[2] in item.after and len(links) == 5
    for before, name, link in zip(item.answers, item.answers[1:], links[1:], strict=False):
        assert link == f"VAR {name} = VAR {before}."
    assert [n.depth for n in item.needles] == sorted(n.depth for n in item.needles)
    assert not set(item.answers) & set(re.findall(r"\w+", " ".join(item.distractors)))


@pytest.mark.parametrize("facts", [1, 2, 3])
def test_stories_are_answered_by_reading_them(facts):
    for seed in range(40):
        item = Facts(facts)(Random(seed))
        assert item.answers[0] == _read([n.text for n in item.needles], item.after)
        assert set(item.distractors) < set(PLACES) - set(item.answers) and len(item.needles) == 8


def _read(sentences: list[str], question: str) -> str:
    """bAbI by another way than the generator's: for each thing its places, from the sentences alone."""
    place, holder, places = {}, {}, {}
    for sentence in sentences:
        person, *_, last = sentence.rstrip(".").split()
        if last in PLACES:
            place[person] = last
            moved = [thing for thing, who in holder.items() if who == person]
        elif any(word in sentence for word in ("took", "picked", "grabbed")):
            holder[last], moved = person, [last]
        else:
            moved = []
            assert holder.pop(last) == person
        for thing in moved:
            if places.setdefault(thing, [None])[-1] != place[person]:
                places[thing].append(place[person])
    if found := re.search(r"Where is ([A-Z]\w+)\?", question):
        return place[found[1]]
    if found := re.search(r"Where is the (\w+)\?", question):
        return places[found[1]][-1]
    thing, before = re.search(r"Where was the (\w+) before the (\w+)\?", question).groups()
    assert places[thing][-1] == before
    return places[thing][-2]


def test_answers_are_read_as_a_reader_would():
    item = Item("", (), "", ("123",), ())
    assert exact(item, " 123. And") and exact(item, ": 123") and exact(item, "123")
    assert not exact(item, "1234") and not exact(item, "is 123") and not exact(item, "")
    several = Item("", (), "", ("ABC", "DEF"), ())
    assert recalled(several, "abc, and also xdefx") == 1 and recalled(several, "DEF") == 0.5


def test_mqar_is_zoologys():
    made = mqar.mqar(0, 200, 64, 8, vocabulary=256)
    for inputs, labels, distances in zip(made.inputs, made.labels, made.distances, strict=True):
        keys, values = inputs[:16:2], inputs[1:16:2]
        assert len(set(keys)) == len(set(values)) == 8
        assert keys.min() >= 1 and keys.max() < 128 and values.min() >= 128
        asked = np.flatnonzero(labels != mqar.UNLABELLED)
        assert len(asked) == 8 and asked.min() >= 16 and not (asked % 2).any()
        held = dict(zip(keys, values, strict=True))
        assert sorted(inputs[asked]) == sorted(keys)
        assert all(labels[place] == held[inputs[place]] for place in asked)
        assert all(inputs[place - distances[place]] == inputs[place] for place in asked)
    # gaps follow the power law: with a = 0.01 the first of 24 slots is drawn first about every fourth time
    first = (mqar.mqar(1, 4000, 64, 1, vocabulary=256).labels[:, 2:] != -100).argmax(1) // 2
    law = np.arange(1, 32) ** -0.99
    assert np.bincount(first, minlength=31)[:3] / 4000 == pytest.approx((law / law.sum())[:3], abs=0.03)
    quiet = mqar.mqar(0, 5, 64, 8, vocabulary=256, noise=False)
    assert (quiet.inputs == 0).sum() == 5 * (64 - 16 - 8)
    assert (mqar.mqar(0, 5, 64, 8, vocabulary=256).labels == quiet.labels).all()
    for arguments in ((63, 4), (32, 9), (64, 16)):
        with pytest.raises(DataError, match="four tokens a pair"):
            mqar.mqar(0, 1, *arguments, vocabulary=32)


class Copier(nn.Module):
    """Predicts what followed the last occurrence of the present token within the window: recall and nothing else."""

    def __init__(self, vocabulary: int, window: int | None = None) -> None:
        super().__init__()
        self.vocabulary, self.window = vocabulary, window
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = LlamaConfig(num_hidden_layers=1)

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        for row, ids in enumerate(input_ids.tolist()):
            for place, token in enumerate(ids):
                least = 0 if self.window is None else max(0, place - self.window + 1)
                before = [i for i in range(least, place) if ids[i] == token]
                if before:
                    logits[row, place, ids[before[0] + 1]] = 30.0
        return SimpleNamespace(logits=logits)


def test_mqar_of_models_that_remember_all_or_a_window():
    vocabulary = len(byte_tokenizer())
    quiet = {"items": 6, "pairs": 8}
    found = measured("mqar", Copier(vocabulary), 96, **quiet)
    assert found["exact", ""].value == found["choice", ""].value == 1.0 and found["exact", ""].n == 48
    assert found["answer_nll", ""].value < 1e-6
    window = 20
    made = mqar.mqar(0, 6, 96, 8, vocabulary=vocabulary // 2 * 2 - 4)
    found = measured("mqar", Copier(vocabulary, window), 96, **quiet)
    asked = made.distances[made.labels != mqar.UNLABELLED]
    assert found["exact", ""].value == pytest.approx((asked < window).mean(), abs=0.05)
    assert found["exact", ""].low <= found["exact", ""].value <= found["exact", ""].high < 1


def test_mqar_on_a_vocabulary_of_a_few_letters(tmp_path):
    letters = {chr(ord("a") + number): number for number in range(26)}
    few = SimpleNamespace(all_special_ids=[], get_vocab=lambda: letters, get_added_vocab=dict)
    unit = Unit("mqar", 24, {"items": 3, "pairs": 4})
    inputs, labels, _ = Mqar()._examples(unit, Setting(few, {}, tmp_path))
    asked = labels != mqar.UNLABELLED
    assert int(asked.sum()) == 12 and set(inputs.flatten().tolist()) <= set(range(26))
    for row, where in enumerate(asked):
        pairs = dict(zip(inputs[row, 0:8:2].tolist(), inputs[row, 1:8:2].tolist(), strict=True))
        assert [pairs[key] for key in inputs[row, where].tolist()] == labels[row, where].tolist()


def test_items_that_are_made_otherwise_have_other_keys(monkeypatch):
    """A score that is in the file already is not measured again: it has to be known by what its items were."""
    unit, setting = Unit("phonebook", 512, {"items": 2}), Setting(byte_tokenizer(), {}, Path("."))
    asked = (Entrant("", "student", "", lambda: None), (), unit, setting)
    now = judge._key(*asked)
    monkeypatch.setattr(judge.TASKS["phonebook"], "revision", 0)
    assert judge._key(*asked) != now
