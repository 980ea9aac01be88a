"""A teacher that is another model, and one that is kept in the machine's memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_llama import byte_tokenizer, tiny_llama
from interrupted import finals
from tokenizers import AddedToken

from linearize import distill
from linearize.config.schema import Recipe
from linearize.distill import finetune, lent, runner
from linearize.errors import RecipeError, RunFolderError


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """One stage that learns a teacher's predictions; without an export."""
    monkeypatch.setattr(runner.exporting, "checkpoint", lambda *given, **_: given[3].checkpoint)
    monkeypatch.setattr(runner, "write_report", lambda folder: folder)
    whole = make_recipe(tokens=3 * 2 * 64)
    stage = replace(whole.stages["recover"], objective={"logits_kl": 1.0})
    return replace(whole, stages={"recover": stage}, eval=replace(whole.eval, ablations=False))


@pytest.fixture
def other_folder(tmp_path: Path) -> Path:
    """A model of three layers and other weights, with the same tokenizer."""
    tiny_llama(layers=3, seed=5).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def running(recipe: Recipe, **changes: Any) -> Recipe:
    return replace(recipe, run=replace(recipe.run, **changes))


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_model_itself_as_another_one(teacher_folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    """A copy under another name is the teacher that the model has anyway."""
    shutil.copytree(teacher_folder, tmp_path / "copy")
    distill.run(str(teacher_folder), recipe, tmp_path / "own")
    distill.run(str(teacher_folder), running(recipe, teacher=str(tmp_path / "copy")), tmp_path / "named")
    assert losses(tmp_path / "named") == pytest.approx(losses(tmp_path / "own"), rel=1e-5)


@pytest.mark.parametrize("kept", ["auto", "cpu"])
def test_another_model(
    kept: str,
    teacher_folder: Path,
    other_folder: Path,
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its predictions are what is learned, wherever it is kept."""
    original, teacher = finetune.teacher_predicts, tiny_llama(layers=3, seed=5)
    seen = []

    def teacher_predicts(model: Any, batch: Any, given: Any, head: Any) -> Any:
        found = original(model, batch, given, head)
        assert lent.is_lent(given) is (kept == "cpu")
        with torch.no_grad():
            logits = teacher(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        torch.testing.assert_close(found.hidden @ found.head.weight.T, logits, rtol=1e-4, atol=1e-4)
        seen.append(len(logits))
        return found

    monkeypatch.setattr(finetune, "teacher_predicts", teacher_predicts)
    asked = running(recipe, teacher=str(other_folder), teacher_device=kept)
    distill.run(str(teacher_folder), asked, tmp_path / "run")
    assert sum(seen) == 3 * 2
    assert "recover" in next(iter(finals(tmp_path / "run")))


def test_a_teacher_that_has_changed(
    teacher_folder: Path, other_folder: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    asked = running(recipe, teacher=str(other_folder))
    with monkeypatch.context() as patch:
        patch.setattr(runner.stages, "train", stop)
        with pytest.raises(runner.RunStopped):
            distill.run(str(teacher_folder), asked, tmp_path / "run")
    tiny_llama(layers=3, seed=6).save_pretrained(other_folder)
    with pytest.raises(RunFolderError, match=r"run.teacher: .*other differs in weights"):
        distill.run(str(teacher_folder), asked, tmp_path / "run", resume=True)


def test_refusals(teacher_folder: Path, other_folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    def refused(changed: Recipe, words: str) -> None:
        with pytest.raises(RecipeError, match=words):
            distill.run(str(teacher_folder), changed, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    named = running(recipe, teacher=str(other_folder))
    plain = replace(named.stages["recover"], objective={"next_token": 1.0})
    refused(replace(named, stages={"recover": plain}), "run.teacher: .* would not be asked")
    refused(running(recipe, teacher_device="cpu"), "run.teacher_device: cpu would keep nothing there")
    wider = tiny_llama(layers=1)
    wider.resize_token_embeddings(264)
    wider.save_pretrained(other_folder)
    refused(named, "predicts 264 tokens, and .* 259")
    tiny_llama(layers=1).save_pretrained(other_folder)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(AddedToken("<extra>"))
    tokenizer.save_pretrained(other_folder)
    refused(named, "'<extra>' is token 259 of .*other, and none of")


def test_two_blocks_at_once() -> None:
    """A lent model gives what it gave, and has no more than two blocks on the device at any time."""
    model, ids = tiny_llama(layers=4).requires_grad_(False), torch.arange(20)[None]
    expected = model(input_ids=ids).logits
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lent.lend(model, torch.device("cpu"))
    held = getattr(model, lent.ATTRIBUTE)
    present: list[int] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(
            lambda *_: present.append(sum(block._fetched is not None for block in held))
        )
    for _ in range(2):
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert present == [2] * 8
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    homes = {tensor.data_ptr() for block in held for tensor in block.home}
    assert {p.data_ptr() for p in model.model.layers.parameters()} == homes
