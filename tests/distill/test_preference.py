"""Preference stages: rows to pairs, pairs to sequences, and the stage itself."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_llama import byte_tokenizer
from interrupted import at_step
from safetensors.torch import load_file

from linearize import data, distill
from linearize.config.schema import DataConfig, LoraConfig, Recipe, StageConfig, StageDataConfig
from linearize.data.continuations import pair
from linearize.distill.preference import pairs
from linearize.errors import DataError

CHAT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}Q:{{ message['content'] }}\nA:"
    "{% else %}{{ message['content'] }}<eos>{% endif %}{% endfor %}"
)
ROWS = [
    {"prompt": f"house {index}?", "chosen": f"corn {index}", "rejected": f"no {index * 7}"}
    for index in range(12)
]


def tokenizer(chat: bool) -> Any:
    made = byte_tokenizer()
    made.chat_template = CHAT if chat else None
    return made


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def documents(path: Path, row: dict[str, Any], *, chat: bool = True) -> list[tuple[tuple[str, bool], ...]]:
    source = write(path / "rows.jsonl", [row])
    found = data.load_texts(source, template="preference", tokenizer=tokenizer(chat))
    return [document.parts for document in found]


# Rows


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {
            "prompt": [turn("user", "q")],
            "chosen": [turn("assistant", "good")],
            "rejected": [turn("assistant", "bad")],
        },
        {
            "prompt": "q",
            "chosen": [turn("user", "q"), turn("assistant", "good")],
            "rejected": [turn("user", "q"), turn("assistant", "bad")],
        },
    ],
    ids=["text", "messages", "whole conversations"],
)
def test_forms_of_a_row(row: dict[str, Any], tmp_path: Path) -> None:
    assert documents(tmp_path, row) == [(("Q:q\nA:", False), ("good<eos>", True), ("bad<eos>", True))]


def test_without_a_chat_template_it_is_plain_text(tmp_path: Path) -> None:
    assert documents(tmp_path, {"prompt": "q", "chosen": "good", "rejected": "bad"}, chat=False) == [
        (("q", False), ("good", True), ("bad", True))
    ]


@pytest.mark.parametrize(
    ("row", "chat", "expected"),
    [
        ({"prompt": "q", "choosen": "a", "rejected": "b"}, True, "did you mean 'choosen'"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, True, "column 'chosen' must hold text"),
        ({"prompt": "q", "chosen": [turn("user", "a")], "rejected": "b"}, True, "must end with a message"),
        (
            {"prompt": "q", "chosen": [turn("user", "r"), turn("assistant", "a")], "rejected": "b"},
            True,
            "must answer the same prompt",
        ),
        (
            {"prompt": [turn("user", "q"), turn("user", "r")], "chosen": "a", "rejected": "b"},
            False,
            "needs a tokenizer with a chat template",
        ),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, True, "there is no text in it"),
    ],
)
def test_rows_that_are_refused(row: dict[str, Any], chat: bool, expected: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=expected):
        documents(tmp_path, row, chat=chat)


# Sequences


@pytest.mark.parametrize("chat", [False, True])
def test_a_pair_is_two_documents_and_padding(chat: bool, tmp_path: Path) -> None:
    made = tokenizer(chat)
    config = DataConfig(source=write(tmp_path / "rows.jsonl", ROWS), template="preference", length=64)
    found = pairs(made, config, tokens=5 * 64, seed=0)
    assert len(found) == 5
    for item in found:
        texts = []
        for sign in (1, -1):
            answer = item["side"] == sign
            assert torch.equal(item["labels"][answer], item["input_ids"][answer])
            texts.append(made.decode(item["input_ids"][answer]))
        assert (item["labels"][item["side"] == 0] == -100).all()
        row = next(row for row in ROWS if f"{row['chosen']}<eos>" == texts[0])
        assert texts[1] == f"{row['rejected']}<eos>"
        (starts,) = (item["position_ids"] == 0).nonzero(as_tuple=True)
        prompt = f"Q:{row['prompt']}\nA:" if chat else row["prompt"]
        whole = made.decode(item["input_ids"])
        assert whole.startswith(f"{prompt}{texts[0]}{prompt}{texts[1]}")
        assert len(starts) == 3 and len(item["input_ids"]) == 64
    order = [tuple(item["input_ids"].tolist()) for item in pairs(made, config, tokens=12 * 64, seed=0)]
    assert order[:5] == [tuple(item["input_ids"].tolist()) for item in found]
    assert order != [
        tuple(item["input_ids"].tolist()) for item in pairs(made, config, tokens=12 * 64, seed=1)
    ]


def test_pairs_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "long " * 20, "chosen": "a", "rejected": "b"}]
    config = DataConfig(source=write(tmp_path / "rows.jsonl", rows), template="preference", length=64)
    assert len(pairs(tokenizer(False), config, tokens=10**6, seed=0)) == len(ROWS)
    config.length = 16
    with pytest.raises(DataError, match=r"no pair fits into 16 tokens .* raise data\.length"):
        pairs(tokenizer(False), config, tokens=10**6, seed=0)
    (tmp_path / "plain.txt").write_text("No answer is preferred here. " * 9)
    with pytest.raises(DataError, match="plain text holds no pairs"):
        pairs(
            tokenizer(False),
            DataConfig(source=str(tmp_path / "plain.txt"), template="preference"),
            tokens=100,
            seed=0,
        )


SAME = [{**row, "rejected": row["chosen"]} for row in ROWS]
TRIMMED = [{**row, "rejected": f" {row['chosen']} "} for row in ROWS]
TRIMS = CHAT.replace("{{ message['content'] }}<eos>", "{{ message['content'] | trim }}<eos>")


@pytest.mark.parametrize(("rows", "template"), [(SAME, None), (SAME, CHAT), (TRIMMED, TRIMS)])
def test_pairs_of_one_answer_prefer_nothing(
    rows: list[dict[str, Any]], template: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Refused where all are; where some are, said. The template may be what makes two answers one."""
    made = tokenizer(False)
    made.chat_template = template

    def read(rows: list[dict[str, Any]]) -> int:
        config = DataConfig(source=write(tmp_path / "rows.jsonl", rows), template="preference", length=64)
        return len(pairs(made, config, tokens=10**6, seed=0))

    for few in (rows, rows[:1]):
        with pytest.raises(
            DataError, match=r"rows\.jsonl: chosen and rejected are the same .*; look at what wrote"
        ):
            read(few)
    assert read([*rows[:3], *ROWS[3:]]) == 12
    assert "3 of 12 pairs have one answer as chosen and as rejected, and teach nothing" in caplog.text
    caplog.clear()
    assert read(ROWS) == 12 and caplog.text == ""


# The stage


def preference_stage(source: str, **changes: Any) -> StageConfig:
    settings: dict[str, Any] = {
        "objective": {"dpo": 1.0},
        "tokens": 8 * 4 * 64,
        "batch_size": 4,
        "micro_batch": 2,
        "lr": 1e-2,
        "train": ["lora"],
        "lora": LoraConfig(rank=2, alpha=4),
        "data": StageDataConfig(source=source, template="preference", length=64),
        "log_every": 1,
        "save_every": 3,
    }
    return StageConfig(**{**settings, **changes})


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("train", ["lora", "all"])
def test_from_the_teacher_itself(
    train: str, teacher_folder: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """The student starts as the softmax itself: a loss of log 2, which falls."""
    recipe = make_recipe()
    recipe.mixer = {"window": {"name": "full"}}
    recipe.eval.ablations = False
    changes: dict[str, Any] = {} if train == "lora" else {"train": ["all"], "lora": None, "lr": 1e-3}
    recipe.stages = {"dpo": preference_stage(write(tmp_path / "rows.jsonl", ROWS), **changes)}
    distill.run(str(teacher_folder), recipe, tmp_path / "run")
    found = losses(tmp_path / "run")
    assert found[0] == pytest.approx(math.log(2), rel=1e-5)
    assert found[-1] < 0.95 * found[0]


def test_resume_is_exact(
    teacher_folder: Path, make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    recipe.eval.ablations = False
    recipe.stages = {"dpo": preference_stage(write(tmp_path / "rows.jsonl", ROWS))}
    distill.run(str(teacher_folder), recipe, tmp_path / "whole")

    def crash() -> None:
        raise ZeroDivisionError

    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        at_step(patch, "dpo", 5, crash)
        distill.run(str(teacher_folder), recipe, out)
    distill.run(str(teacher_folder), recipe, out, resume=True)
    assert losses(out) == losses(tmp_path / "whole")
    expected, found = (
        load_file(folder / "stage-1-dpo" / "final.safetensors") for folder in (tmp_path / "whole", out)
    )
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_pairs_of_the_packaged_text(tmp_path: Path) -> None:
    """A sentence, what follows it, and what does not; none out of a chat's markup."""
    config = DataConfig(source="builtin", template="preference", length=700)
    made = byte_tokenizer()
    made.chat_template = None
    found = pairs(made, config, tokens=20 * 700, seed=0)
    assert len(found) == 20 and len({tuple(prompt) for prompt, _, _ in found.pairs}) == 20
    for document in itertools.islice(data.load_texts("builtin", template="preference", seed=0), 50):
        (prompt, asked), (chosen, right), (rejected, wrong) = document.parts
        assert (asked, right, wrong) == (False, True, True)
        assert chosen != rejected and "<|" not in document.text and prompt[-1] in ".!?"


def test_sentences_that_follow_and_that_do_not() -> None:
    text = "Too short. The first of the sentences stands here. The second one follows upon it! Nothing "
    document = pair(text + "in between counts here at all? And the last of them is far away.")
    assert document is not None
    assert [part for part, _ in document.parts] == [
        "The first of the sentences stands here.",
        " The second one follows upon it!",
        " And the last of them is far away.",
    ]
    assert pair("One sentence that is all there is. Two of them are no pair at all.") is None
