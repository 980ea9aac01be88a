"""The tiny Llama as an ordinary checkpoint, and a recipe that trains it in a second."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import several
import several_recipes
import torch
from byte_llama import MIXER, TEXT, byte_tokenizer, tiny_llama
from transformers import LlamaForCausalLM

from linearize.config.schema import DataConfig, EvalConfig, LoraConfig, Recipe, RunConfig, StageConfig


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary checkpoint folder of the tiny teacher."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher with one table for embedding and head."""
    folder = tmp_path_factory.mktemp("tied")
    config = tiny_llama().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def every_stage(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe for several processes."""
    return several_recipes.every_stage(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def of_one_process(
    teacher_folder: Path, every_stage: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What one process makes of it."""
    folder = tmp_path_factory.mktemp("reference")
    ended = several.start(1, several.run, str(teacher_folder), every_stage, folder / "run", folder=folder)
    assert ended.codes == [0], ended.said
    return folder / "run"


@pytest.fixture
def make_recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """A two-stage recipe on a text file; keyword arguments change the stages' fields."""
    return recipes_in(tmp_path)


@pytest.fixture(scope="module")
def module_recipe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """`make_recipe` for what a module makes once."""
    return recipes_in(tmp_path_factory.mktemp("text"))


def recipes_in(folder: Path) -> Callable[..., Recipe]:
    text = folder / "text.txt"
    text.write_text(TEXT, encoding="utf-8")

    def make(**changes: Any) -> Recipe:
        common: dict[str, Any] = {
            "tokens": 10 * 2 * 64,
            "batch_size": 2,
            "log_every": 1,
            "save_every": 3,
            **changes,
        }
        return Recipe(
            description="tiny",
            mixer=MIXER,
            stages={
                "transfer": StageConfig(objective={"attention_output_relative": 1.0}, lr=1e-2, **common),
                "recover": StageConfig(
                    objective={"next_token": 1.0, "logits_kl": 0.5},
                    lr=1e-3,
                    train=["lora"],
                    lora=LoraConfig(rank=2, alpha=4, dropout=0.1),
                    **common,
                ),
            },
            data=DataConfig(source=str(text), validation=str(text), length=64),
            eval=EvalConfig(length=64, max_windows=4),
            run=RunConfig(device="cpu"),
        )

    return make


@pytest.fixture(autouse=True, scope="module")
def unrendered(pictures_unrendered: None) -> None:
    """Pictures are rendered by `test_runner.py` and `test_course.py`."""


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """Ctrl-C as in a terminal: a shell starts what runs in the background with it ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny tensors: threads only wait for each other."""
    torch.set_num_threads(1)
