"""MMLU and HellaSwag from local files, by lm-eval's own definitions: our scores are those of `lm_eval --model hf`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from byte_llama import MIXER, byte_tokenizer, tiny_llama

from linearize import cli, export, surgery
from linearize.cli.checkpoint import load
from linearize.eval import lm_tasks
from linearize.eval.lm_tasks import Items
from linearize.eval.measurement import Setting

lm_eval = pytest.importorskip("lm_eval")
DEFINITIONS = Path(lm_eval.__file__).parent / "tasks"
WORDS = (
    "the",
    "river",
    "rose",
    "in",
    "spring",
    "miller",
    "moved",
    "his",
    "corn",
    "upper",
    "house",
    "dogs",
    "slept",
)
SUBJECTS = ("astronomy", "virology")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, own_tasks_once) -> Path:
    """The two tasks' YAMLs as lm-eval has them, with data of their form that lies beside them."""
    folder, random = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(random.choice(WORDS, count))

    def lines(name: str, items: list[dict]) -> str:
        (folder / name).write_text("\n".join(map(json.dumps, items)))
        return str(folder / name)

    def local(name: str, definition: str, files: dict[str, str], **more) -> None:
        task = {"task": name, "include": str(DEFINITIONS / definition), "dataset_path": "json", **more}
        task["dataset_kwargs"] = {"data_files": files}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))

    endings = [
        {"ind": n, "activity_label": words(2), "ctx_a": words(8), "ctx_b": words(3), "ctx": "",
         "endings": [f"{words(int(k))} [header] {words(2)}." for k in random.integers(2, 9, 4)],
         "label": str(random.integers(4))}
        for n in range(9)
    ]  # fmt: skip
    files = {
        "train": lines("hs-train.jsonl", endings[:2]),
        "validation": lines("hs-val.jsonl", endings[2:]),
    }
    local("hellaswag_here", "hellaswag/hellaswag.yaml", files)
    for subject in SUBJECTS:
        questions = [
            {
                "question": f" {words(5)}? ",
                "choices": [words(2) for _ in range(4)],
                "answer": int(random.integers(4)),
            }
            for _ in range(8)
        ]
        files = {
            "dev": lines(f"{subject}-dev.jsonl", questions[:5]),
            "test": lines(f"{subject}-test.jsonl", questions[5:]),
        }
        definition = f"mmlu/default/mmlu_{subject}.yaml"
        local(
            f"mmlu_{subject}_here", definition, files, dataset_name=None, num_fewshot=5, tag="mmlu_here_all"
        )
    sums = [{"question": f"{words(5)} {n} and 3?", "answer": f"{words(3)} #### {n + 3}"} for n in range(9)]
    files = {"train": lines("gsm-train.jsonl", sums[:5]), "test": lines("gsm-test.jsonl", sums[5:])}
    local(
        "gsm8k_here", "gsm8k/gsm8k.yaml", files, dataset_name=None, num_fewshot=2,
        generation_kwargs={"until": ["Question:"], "do_sample": False, "max_gen_toks": 12},
    )  # fmt: skip
    group = {
        "group": "mmlu_here",
        "task": [f"mmlu_{subject}_here" for subject in SUBJECTS],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (folder / "mmlu_here.yaml").write_text(yaml.safe_dump(group))
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A conversion with its teacher, which holds 5 worked examples of bytes."""
    folder = tmp_path_factory.mktemp("models")
    teacher = tiny_llama()
    teacher.config.max_position_embeddings = 1024
    teacher.save_pretrained(folder / "teacher")
    byte_tokenizer().save_pretrained(folder / "teacher")
    model = surgery.convert(teacher, MIXER)
    base = str(folder / "teacher")
    export.save(model, folder / "mine", tokenizer=byte_tokenizer(), base=base, recipe={"mixer": MIXER})
    return folder


@pytest.fixture(scope="module")
def ours(converted, tasks, tmp_path_factory) -> dict[tuple[str, str, str], dict]:
    """(role, task, metric) -> row of the command's."""
    out = tmp_path_factory.mktemp("out")
    line = ["eval", converted / "mine", "--suite", "tasks", "--tasks", "hellaswag_here,mmlu_here"]
    line += ["--include-path", tasks, "--out", out]
    assert cli.main([str(part) for part in line]) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    return {(row["role"], row["task"], row["metric"]): row for row in rows if not row["by"]}


def theirs(model: Path, tasks: Path, batch_size: int | str) -> dict[tuple[str, str], float]:
    """(task, metric) -> score, as `lm_eval --model hf` computes it."""
    arguments = {"pretrained": str(model), "dtype": "float32"}
    manager = lm_tasks._manager(tasks)
    names = ["hellaswag_here", "mmlu_here"]
    found = lm_eval.simple_evaluate(
        "hf", model_args=arguments, tasks=names, task_manager=manager, batch_size=batch_size, device="cpu",
        bootstrap_iters=0, max_batch_size=16,
    )["results"]  # fmt: skip
    return {
        (task, metric): found[task][f"{metric},none"]
        for task, metric in (("hellaswag_here", "acc"), ("hellaswag_here", "acc_norm"), ("mmlu_here", "acc"))
    }


FOLDERS = {"student": "mine", "teacher": "teacher"}


@pytest.mark.parametrize(
    ("role", "batch_size"),
    [
        pytest.param(role, size, marks=() if (role, size) == ("student", "auto") else pytest.mark.slow)
        for role in FOLDERS
        for size in (1, 7, "auto")
    ],
)
def test_scores_are_those_of_lm_evals_own_model(converted, tasks, ours, role, batch_size):
    expected = theirs(converted / FOLDERS[role], tasks, batch_size)
    assert {place: ours[role, *place]["value"] for place in expected} == pytest.approx(expected)
    assert ours[role, "mmlu_here", "acc"]["n"] == 6 and ours[role, "hellaswag_here", "acc"]["n"] == 7


def test_the_worked_examples_are_mmlus_own(converted, tasks, ours, tmp_path):
    """Without them the model reads other prompts: the YAML's five are the first five of `dev`."""
    manager = lm_tasks._manager(tasks)
    found = manager.load(["mmlu_astronomy_here"])
    [task] = found["tasks"].values() if "tasks" in found else found.values()
    context = task.fewshot_context(next(iter(task.test_docs())), num_fewshot=5)
    assert str(context).startswith(
        "The following are multiple choice questions (with answers) about astronomy."
    )
    dev = [json.loads(line) for line in (tasks / "astronomy-dev.jsonl").read_text().splitlines()]
    assert [str(context).index(item["question"].strip()) for item in dev] == sorted(
        str(context).index(item["question"].strip()) for item in dev
    )
    assert str(context).count("Answer:") == 6


def test_what_is_written_is_what_lm_evals_own_model_writes(converted, tasks, tmp_path):
    """GSM8K's form, whose answers are decoded; the numbers of a model of two layers are all wrong."""
    model, tokenizer = load(str(converted / "mine"), "cpu")
    [unit] = lm_tasks.suite(["gsm8k_here"], shots=None, limit=0, include=tasks, data=None).units
    ours = lm_tasks.evaluate(model, Setting(tokenizer, {}, tmp_path), unit.settings)
    found = lm_eval.simple_evaluate(
        "hf", model_args={"pretrained": str(converted / "mine"), "dtype": "float32"}, tasks=["gsm8k_here"],
        task_manager=lm_tasks._manager(tasks), batch_size=1, device="cpu", bootstrap_iters=0,
    )  # fmt: skip
    mine, other = (
        {sample["doc_id"]: sample["resps"][0][0] for sample in one["samples"]["gsm8k_here"]}
        for one in (ours, found)
    )
    assert len(mine) == 4 and mine == other and all(mine.values())
    assert len(Items.of(ours, "gsm8k_here").values["exact_match, strict-match"]) == 4
