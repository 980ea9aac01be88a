"""lm-eval tasks as rows: equal to lm-eval's own, at any batch size; chance, relative scores, and what is refused."""

from __future__ import annotations

import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from linearize.errors import DataError, LinearizeError
from linearize.eval import lm_tasks
from linearize.eval.lm_requests import Share
from linearize.eval.lm_tasks import Items, _relative, evaluate, suite
from linearize.eval.measurement import Setting

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("own_tasks_once")

CHOICES = ["red dog", "blue", "the cat sat", "tree"]


@pytest.fixture
def tasks(tmp_path):
    """A folder with a task of its own and a group of it; the data lies beside them."""
    random = np.random.default_rng(0)
    items = []
    for _ in range(11):
        words = " ".join(
            random.choice(["the", "cat", "dog", "sat", "ran", "on", "mat", "tree", "red", "blue"], 6)
        )
        items.append({"query": words, "choices": CHOICES, "gold": int(random.integers(4))})
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    for name in ("mine_a", "mine_b"):
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}},
            "test_split": "test",
            "fewshot_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{query}} .",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task))
    group = {
        "group": "mine",
        "task": ["mine_a", "mine_b"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(group))
    return tmp_path


def named(folder, name: str, **options) -> dict:
    [found] = suite([name], **{"shots": None, "limit": 0, "include": folder, "data": None, **options}).units
    return dict(found.settings)


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 7, "auto"])
def test_scores_are_those_of_lm_eval(model, tokenizer, tasks, tmp_path, batch_size):
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    settings = named(tasks, "mine_a", shots=2) | {"batch_size": batch_size}
    ours = evaluate(model, Setting(tokenizer, {}, tmp_path), settings)
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=128)
    theirs = lm_eval.simple_evaluate(
        plain, tasks=["mine_a"], num_fewshot=2, task_manager=lm_tasks._manager(tasks), bootstrap_iters=0
    )
    assert ours["results"]["mine_a"]["acc,none"] == theirs["results"]["mine_a"]["acc,none"]
    own, other = (
        [pair[0] for sample in found["samples"]["mine_a"] for pair in sample["filtered_resps"]]
        for found in (ours, theirs)
    )
    assert own == pytest.approx(other, abs=1e-4) and len(set(own)) > 40


def test_a_group_is_the_pool_of_its_tasks(model, tokenizer, tasks, tmp_path):
    results = evaluate(model, Setting(tokenizer, {}, tmp_path), named(tasks, "mine"))
    found = Items.of(results, "mine")
    assert len(found.values["acc"]) == 22 and set(found.chance) == {0.25}
    [row] = [row for row in lm_tasks._scores(results["results"]["mine"], found, 0) if row.metric == "acc"]
    assert row.value == pytest.approx(np.mean(found.values["acc"])) and row.low < row.value < row.high


def test_a_task_is_counted_before_it_begins_and_its_bar_ends_there(model, tokenizer, tasks, tmp_path):
    setting, read, steps = Setting(tokenizer, {}, tmp_path), [], []
    expected = lm_tasks.estimate(setting, named(tasks, "mine_a"))
    forward = model.forward
    model.forward = lambda *a, **k: read.append(k["input_ids"].numel()) or forward(*a, **k)
    evaluate(model, setting, named(tasks, "mine_a"), Share(SimpleNamespace(advance=steps.append), expected))
    assert sum(steps) == expected and len(steps) > 1 and min(steps) > 0
    assert expected <= sum(read) < 1.5 * expected  # with padding
    assert lm_tasks.estimate(setting, named(tasks, "mine_a", limit=3)) < 0.4 * expected
    assert lm_tasks.estimate(setting, named(tasks, "mine", shots=4)) > 3 * expected


def test_a_bar_never_ends_behind_its_end():
    steps: list[int] = []
    share = Share(SimpleNamespace(advance=steps.append), 100)
    share.advance(7)  # nothing was asked for yet
    with share.of(50):
        with share.of(50):  # a part of the same
            share.advance(20)
            assert sum(steps) == 40
        share.advance(1000)  # padding
        assert sum(steps) == 100
    with share.of(10):  # what comes unexpected has no room left
        share.advance(10)
    assert sum(steps) == 100


def test_relative_scores_begin_at_chance():
    rng = np.random.default_rng(1)
    chance = [0.25] * 400
    teacher = Items({"acc": [float(x) for x in rng.random(400) < 0.75]}, chance)
    [same] = _relative(teacher, teacher, 0)
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)
    guesses = Items({"acc": [float(x) for x in rng.random(400) < 0.25]}, chance)
    [none] = _relative(guesses, teacher, 0)
    assert none.low < 0 < none.high and none.bucket == "acc" and none.against == "teacher"
    half = Items({"acc": [float(x) for x in rng.random(400) < 0.5]}, chance)
    [middle] = _relative(half, teacher, 0)
    assert 0.3 < middle.value < 0.7 and middle.low < 0.5 < middle.high
    assert _relative(half, guesses, 0) == [] or _relative(half, guesses, 0)[0].value > 1
    assert _relative(half, Items({"acc": [0.0] * 400}, chance), 0) == []


def test_published_shots_and_unknown_tasks(tasks):
    assert named(tasks, "piqa")["shots"] == 0 and named(tasks, "piqa", shots=3)["shots"] == 3
    assert named(tasks, "mmlu")["shots"] == 5 and named(tasks, "mine_a")["shots"] is None
    with pytest.raises(LinearizeError, match=r"no task 'hellaswagg'; did you mean 'hellaswag'\?"):
        named(tasks, "hellaswagg")
    with pytest.raises(LinearizeError, match="needs --task-data DIR"):
        named(tasks, "all")
    with pytest.raises(DataError, match=r"piqa.jsonl not found"):
        named(None, "piqa", data=tasks)
    with pytest.raises(LinearizeError, match=r"--task-data: mine_a, hellaswag: not read .* \(.*piqa"):
        suite(["mine_a", "hellaswag"], shots=None, limit=0, include=tasks, data=tasks)
    (tasks / "piqa.jsonl").write_text(json.dumps({"query": "the cat", "choices": CHOICES, "gold": 1}))
    with pytest.raises(LinearizeError, match="--include-path: piqa: read from --task-data"):
        named(tasks, "piqa", data=tasks)
    assert len(suite(["mine_a", "piqa"], shots=None, limit=0, include=tasks, data=tasks).units) == 2


def test_scores_are_of_the_files_that_were_read(tasks, tmp_path, tmp_path_factory):
    """Items, or a task's own definition, that have changed since are another measurement; a copy is none."""
    first = named(tasks, "mine_a")
    assert named(tasks, "mine_a") == first
    items = tasks / "items.jsonl"
    whole = items.read_text()
    items.write_text(whole.replace("red dog", "red cat"))
    assert named(tasks, "mine_a") != first
    items.write_text(whole)
    assert named(tasks, "mine_a") == first
    elsewhere = tmp_path_factory.mktemp("data") / "items.jsonl"
    elsewhere.write_text(whole)
    task = tasks / "mine_a.yaml"
    task.write_text(task.read_text().replace(str(items), str(elsewhere)) + "process_docs: !function f.f\n")
    there = named(tasks, "mine_a")
    elsewhere.write_text(whole + "\n")
    assert named(tasks, "mine_a") not in (there, first)
    local = {"query": "the cat", "choices": CHOICES, "gold": 1}
    for limit, same in ((1, True), (0, False)):  # what a limit leaves out is not read
        read = []
        for last in ("sat", "ran"):
            lines = [local, {**local, "query": f"the cat {last}"}]
            (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, lines)))
            read.append(named(None, "piqa", data=tmp_path, limit=limit))
        assert (read[0] == read[1]) == same


def test_a_folder_of_tasks_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(LinearizeError, match=r"--include-path: no folder '.*gone'"):
        named(tmp_path / "gone", "mine")
    (tmp_path / "mine.yaml").write_text("task: mine\ndoc_to_text: !function utils.text\n")
    with pytest.raises(LinearizeError, match="no task 'other'") as caught:  # a tag of lm-eval's is no damage
        named(tmp_path, "other")
    assert len(str(caught.value)) < 200  # of the names of all thousands one holds any word
    (tmp_path / "cut.yaml").write_text("task: [mine\n")
    with pytest.raises(LinearizeError, match=r"cut\.yaml is no YAML .*line 2"):
        named(tmp_path, "mine")


def test_a_task_of_ones_own_that_cannot_be_measured_names_its_file(model, tokenizer, tasks, tmp_path):
    file = tasks / "mine_b.yaml"
    file.write_text(file.read_text().replace("test_split: test", "test_split: tset"))
    with pytest.raises(
        LinearizeError, match=r"'mine_b' cannot be measured: .*tset.*; look at .*mine_b\.yaml and at"
    ):
        lm_tasks.estimate(Setting(tokenizer, {}, tmp_path), named(tasks, "mine_b"))


def test_an_answer_that_is_longer_than_the_model_holds_is_named(model, tokenizer, tasks, tmp_path):
    items = [{"query": "the cat", "choices": ["cat " * 400, "dog"], "gold": 1}]
    (tasks / "items.jsonl").write_text(json.dumps(items[0]))
    with pytest.raises(DataError, match=r"an answer of [\d,]+ tokens, and the model holds [\d,]+"):
        evaluate(model, Setting(tokenizer, {}, tmp_path), named(tasks, "mine_a"))


def test_without_the_hub_a_task_of_its_data_ends_at_once_with_the_remedy(
    model, tokenizer, tmp_path, monkeypatch
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    lm_tasks.hub_away.cache_clear()
    here, sleep, waited = threading.get_ident(), time.sleep, []

    def asleep(seconds: float) -> None:
        waited.append(seconds) if threading.get_ident() == here else sleep(seconds)

    monkeypatch.setattr(time, "sleep", asleep)
    with pytest.raises(LinearizeError) as caught:
        settings = {"name": "hellaswag", "shots": None, "limit": 1, "include": None, "data": None}
        lm_tasks.evaluate(model, Setting(tokenizer, {}, tmp_path), settings)
    lm_tasks.hub_away.cache_clear()
    said = str(caught.value)
    assert "lm-eval's task 'hellaswag' cannot be measured" in said and "hub cannot be reached" in said
    assert "--include-path DIR" in said and "--task-data DIR" in said and sum(waited) < 5
