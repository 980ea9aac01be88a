"""A stage's own text: chat data whose prompts carry no loss, and lengths that differ from stage to stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from byte_llama import byte_tokenizer, tiny_llama
from torch import Tensor
from torch.nn import functional as F

from linearize import data, distill
from linearize.config.schema import DataConfig, Recipe, StageConfig, StageDataConfig
from linearize.errors import LinearizeError

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}Q:{{ message['content'] }}\nA:"
    "{% else %}{{ message['content'] }}<eos>{% endif %}{% endfor %}"
)
PROMPTS = [f"house {index:02d}?" for index in range(8)]
ANSWERS = [f"corn {index * 37:03d}" for index in range(8)]
DOCUMENT = len("Q:house 00?\nA:corn 000") + 1


@pytest.fixture
def chat_folder(tmp_path: Path) -> Path:
    """The tiny teacher with a chat template."""
    folder = tmp_path / "chat-teacher"
    tiny_llama().save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chat_file(tmp_path: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answer_losses() -> Tensor:
    """The teacher's loss on every token of every answer, each document alone, the prompt given."""
    tokenizer, teacher, losses = byte_tokenizer(), tiny_llama(), []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        asked = tokenizer(f"Q:{prompt}\nA:", add_special_tokens=False).input_ids
        told = tokenizer(f"{answer}<eos>", add_special_tokens=False).input_ids
        ids = torch.tensor([asked + told])
        assert ids.shape[1] == DOCUMENT
        with torch.no_grad():
            logits = teacher(ids).logits[0, len(asked) - 1 : -1]
        losses.append(F.cross_entropy(logits, ids[0, len(asked) :], reduction="none"))
    return torch.cat(losses)


def stage(chat_file: Path, **changes: object) -> StageConfig:
    """One step over all eight documents, two to a sequence."""
    settings = {
        "objective": {"next_token": 1.0},
        "tokens": 8 * DOCUMENT,
        "batch_size": 4,
        "lr": 1e-3,
        "train": ["all"],
        "data": StageDataConfig(source=str(chat_file), template="chat", length=2 * DOCUMENT),
        "log_every": 1,
    }
    return StageConfig(**{**settings, **changes})


def test_only_answers_carry_loss(
    chat_folder: Path, chat_file: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """The loss of the first step is the teacher's own on the answers: the mixer is the softmax itself."""
    recipe = make_recipe()
    recipe.mixer = {"window": {"name": "full"}}
    recipe.eval.ablations = False
    recipe.stages = {"sft": stage(chat_file)}
    distill.run(str(chat_folder), recipe, tmp_path / "run")
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["loss"] == pytest.approx(answer_losses().mean().item(), rel=1e-5)


def test_labels_of_the_packed_chat(chat_file: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    text = DataConfig().of(stage(chat_file))
    for item in data.packed(tokenizer, text, tokens=8 * DOCUMENT, seed=0):
        labeled = item["labels"] != -100
        assert torch.equal(item["labels"][labeled], item["input_ids"][labeled])
        told = [tokenizer.decode(part[mask]) for part, mask in halves(item["input_ids"], labeled)]
        assert all(text.removesuffix("<eos>") in ANSWERS for text in told)


def halves(ids: Tensor, labeled: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(ids.split(DOCUMENT), labeled.split(DOCUMENT), strict=True))


def test_each_stage_reads_its_own_text(
    chat_folder: Path, chat_file: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make_recipe(tokens=2 * 2 * 64)
    recipe.eval.ablations = False
    del recipe.stages["recover"]
    recipe.stages["transfer"].data = StageDataConfig(length=32)
    recipe.stages["sft"] = stage(chat_file, tokens=3 * 8 * DOCUMENT)
    distill.run(str(chat_folder), recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["tokens"]) for line in lines] == [
        *(("transfer", step * 2 * 32) for step in range(1, 5)),
        *(("sft", step * 8 * DOCUMENT) for step in range(1, 4)),
    ]
    sft = [line["loss"] for line in lines if line["stage"] == "sft"]
    assert sft[-1] < sft[0]


def test_a_wrong_column_of_a_stage_is_told_before_anything_is_written(
    chat_folder: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"mesages": []}\n')
    recipe = make_recipe()
    recipe.stages["sft"] = stage(rows)
    with pytest.raises(LinearizeError, match="did you mean 'mesages'"):
        distill.run(str(chat_folder), recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
