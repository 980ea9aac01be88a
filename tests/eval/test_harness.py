"""The five task files end to end through lm-eval on a random model; and every way the data can be wrong."""

from __future__ import annotations

import json
import math
import os
import random
import sys

import numpy as np
import pytest
import torch

from linearize.errors import DataError, LinearizeError, NotFiniteError
from linearize.eval import harness
from linearize.eval.harness import check_data, expand, run_tasks, task_names

QUESTION = "Question : the cat sat on the mat . "
ITEMS = {
    "piqa": [{"query": QUESTION, "choices": ["red dog", "blue"], "gold": 0}] * 3,
    "arc_easy": [{"query": QUESTION, "choices": ["a cat", "the dog ran", "tree"], "gold": 2}] * 2,
    "arc_challenge": [{"query": QUESTION, "choices": ["it", "was", "red", "mat"], "gold": 1}] * 2,
    "winogrande": [{"context_options": ["the cat", "the dog"], "continuation": "sat under it", "gold": 1}]
    * 2,
    "lambada_openai": [{"context": "the cat sat on the", "continuation": word} for word in ("mat", "tree")],
}


@pytest.fixture
def data_dir(tmp_path):
    for task, items in ITEMS.items():
        (tmp_path / f"{task}.jsonl").write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    return tmp_path


def log_probability(model, tokenizer, context: str, continuation: str) -> float:
    prefix = tokenizer(context)["input_ids"]
    ids = torch.tensor([prefix + tokenizer(continuation)["input_ids"]])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0].log_softmax(-1)
    return sum(logs[at - 1, ids[0, at]].item() for at in range(len(prefix), ids.shape[1]))


def test_the_five_tasks_are_there():
    assert task_names() == ["arc_challenge", "arc_easy", "lambada_openai", "piqa", "winogrande"]
    assert expand("all") == task_names()
    assert expand(["piqa", "all", "piqa"])[0] == "piqa" and len(expand(["piqa", "all"])) == 5
    assert expand([]) == []


def test_an_unknown_task_offers_the_nearest():
    with pytest.raises(LinearizeError, match=r"unknown task 'arc_eazy': did you mean 'arc_easy'\?"):
        expand(["arc_eazy"])


@pytest.mark.parametrize("task", ["piqa", "winogrande", "lambada_openai"])
def test_a_model_of_nan_has_no_score(model, tokenizer, data_dir, task, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(data_dir)
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    with pytest.raises(
        NotFiniteError, match=rf"task '{task}', item 1: the log-likelihood is nan; the model's"
    ):
        run_tasks(model.eval(), tokenizer, [task], data_dir=data_dir, progress=False)


def test_a_perplexity_of_words_that_overflows_is_infinite(model, tokenizer, data_dir, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(data_dir)
    with torch.no_grad():
        model.model.norm.weight.mul_(1e6)
    found = run_tasks(model.eval(), tokenizer, ["lambada_openai"], data_dir=data_dir, progress=False)
    assert found["lambada_openai"]["perplexity"] == math.inf


def test_all_tasks_end_to_end(model, tokenizer, data_dir, capfd, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(data_dir)  # no git checkout: lm-eval must not ask for its commit, which git would print
    model.eval()
    results = run_tasks(model, tokenizer, ["all"], data_dir=data_dir, batch_size=2, progress=False)
    assert list(results) == task_names()
    assert {task: scores["items"] for task, scores in results.items()} == {
        task: len(i) for task, i in ITEMS.items()
    }
    for task in ("piqa", "arc_easy", "arc_challenge"):
        item = ITEMS[task][0]
        sums = [
            log_probability(model, tokenizer, item["query"] + "Answer:", " " + c) for c in item["choices"]
        ]
        per_byte = [value / len(choice) for value, choice in zip(sums, item["choices"], strict=True)]
        assert results[task]["acc"] == float(int(np.argmax(sums)) == item["gold"])
        assert results[task]["acc_norm"] == float(int(np.argmax(per_byte)) == item["gold"])
    item = ITEMS["winogrande"][0]
    sums = [
        log_probability(model, tokenizer, context, item["continuation"])
        for context in item["context_options"]
    ]
    assert results["winogrande"]["acc"] == float(int(np.argmax(sums)) == item["gold"])
    words = [
        log_probability(model, tokenizer, i["context"], i["continuation"]) for i in ITEMS["lambada_openai"]
    ]
    assert results["lambada_openai"]["perplexity"] == pytest.approx(
        math.exp(-sum(words) / len(words)), rel=1e-4
    )
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_an_item_that_spells_a_control_token_is_scored_as_text(model, tokenizer, data_dir):
    pytest.importorskip("lm_eval")
    item = {"query": "the <eos> cat ", "choices": ["<eos> dog", "sat \u2028 <eos>"], "gold": 1}
    lines = json.dumps(item, ensure_ascii=False).encode() + b"\n"
    (data_dir / "piqa.jsonl").write_bytes(b"\xef\xbb\xbf" + lines * 2)
    seen: list[torch.Tensor] = []
    forward = model.forward
    model.forward = lambda *a, **k: seen.append(k["input_ids"]) or forward(*a, **k)
    assert run_tasks(model, tokenizer, "piqa", data_dir=data_dir, progress=False)["piqa"]["items"] == 2
    assert seen and not any((ids == tokenizer.eos_token_id).any() for ids in seen)


def test_nothing_of_the_caller_is_changed(model, tokenizer, data_dir):
    pytest.importorskip("lm_eval")
    model.train()
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    expected = (torch.rand(1).item(), random.random(), np.random.rand())
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    run_tasks(model, tokenizer, "piqa", data_dir=data_dir, progress=False)
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected
    assert model.training and tokenizer.pad_token is None


def test_limit_and_bf16(model, tokenizer, data_dir):
    pytest.importorskip("lm_eval")
    results = run_tasks(
        model, tokenizer, ["piqa"], data_dir=str(data_dir), limit=2, autocast=torch.bfloat16, progress=False
    )
    assert results["piqa"]["items"] == 2
    assert results["piqa"]["acc_stderr"] == 0.0


def test_requests_are_counted_before_anything_runs(data_dir):
    assert check_data(["all"], data_dir) == {
        "arc_challenge": 8, "arc_easy": 6, "lambada_openai": 2, "piqa": 6, "winogrande": 4,
    }  # fmt: skip
    assert check_data(["piqa"], data_dir, limit=1) == {"piqa": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"piqa.jsonl not found: task 'piqa' reads .*query \(str\), choices \(list\), gold \(int\)"),
        ("", r"piqa.jsonl is empty"),
        ('{"query": "q", "choices": ["a"], "gold": 0}\n{"query": ', r"line 2: not JSON"),
        ('{"query": "q", "choices": ["a"]}', r"line 1: no column 'gold' of type int"),
        ('{"query": "q", "choices": "a", "gold": 0}', r"line 1: no column 'choices' of type list"),
        ('{"query": "q", "choices": ["a", 3], "gold": 0}', r"line 1: no column 'choices' of type list"),
        ('{"query": "q", "choices": ["a", "b"], "gold": true}', r"line 1: no column 'gold' of type int"),
        ('{"query": "q", "choices": ["a"], "gold": 1}', r"line 1: gold 1 .* 1 choices"),
    ],
)
def test_bad_data_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "piqa.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        check_data(["piqa"], tmp_path)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: path.mkdir(), "piqa.jsonl not found"),
        (lambda path: os.mkfifo(path), "is a named pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device"),
        (lambda path: path.symlink_to(path), "cannot be read"),
        (lambda path: path.write_bytes("{}".encode("utf-16")), "mark of UTF-16.*; task 'piqa' reads"),
    ],
)
def test_a_task_that_is_no_file(tmp_path, make, problem):
    make(tmp_path / "piqa.jsonl")
    with pytest.raises(DataError, match=problem):
        check_data(["piqa"], tmp_path)


@pytest.mark.parametrize("folder", ["", "/no/such/folder"])
def test_a_missing_folder_says_what_belongs_there(folder):
    with pytest.raises(DataError, match=r"no folder '.*eval.task_data"):
        check_data(["winogrande"], folder)


def test_lm_eval_missing_names_the_extra(model, tokenizer, data_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LinearizeError, match=r"pip install 'lm-eval>=0\.4"):
        run_tasks(model, tokenizer, ["piqa"], data_dir=data_dir, progress=False)


def test_no_tasks_need_nothing(model, tokenizer):
    assert harness.run_tasks(model, tokenizer, [], data_dir="") == {}
