"""The closed-form start block by block, and a checkpoint that nobody holds whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import blocked
import pytest
import tiny
import torch
from interrupted import Crash
from transformers import AutoModelForCausalLM

from linearize import surgery
from linearize.distill import calibrate as whole
from linearize.distill.blockwise import exporting
from linearize.distill.blockwise.calibrating import _Sweep, calibrate
from linearize.distill.blockwise.job import Job
from linearize.distill.blockwise.writing import write
from linearize.errors import LinearizeError
from linearize.models import load_teacher


def test_a_calibration_that_is_killed_goes_on_with_the_next_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = blocked.teacher(tmp_path / "teacher", layers=3)
    recipe, out = blocked.recipe(source, calibrate=256), tmp_path / "run"
    went: list[int] = []
    block = _Sweep.block

    def failing(self: _Sweep, number: int, meter: Any) -> None:
        if number == 2 and 2 not in went:
            went.append(2)
            raise Crash
        went.append(number)
        block(self, number, meter)

    monkeypatch.setattr(_Sweep, "block", failing)
    with pytest.raises(Crash):
        write(Job(source, recipe, out))
    write(Job(source, recipe, out))
    assert went == [0, 1, 2, 2]
    model: Any = surgery.convert(load_teacher(source)[0], recipe.mixer)
    torch.manual_seed(0)
    surgery.reset_mixers(model)
    job = Job(source, recipe, out)
    found = whole.calibrate(model, whole.text(recipe, job.tokenizer), autocast=None)
    expected = {name: x.clone() for name, x in surgery.mixer_state(model).items()}
    whole.restore(model, out / "stage-0-calibrate")
    assert found
    for name, value in surgery.mixer_state(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    assert not list((out / "stage-0-calibrate").glob(".partial*"))


GATED = {
    "feature_map": {"name": "identity", "l2_normalize": True},
    "gate": {"name": "mamba2"},
    "update": {"name": "delta"},
    "normalizer": {"name": "none"},
    "output": {"name": "gate", "rank": 4},
}


WINDOWED = {
    "feature_map": {"name": "relu"},
    "window": {"name": "sliding", "size": 8},
    "combine": {"name": "shared_normalizer", "complement": True},
}


@pytest.mark.parametrize(
    ("mixer", "kept", "sign", "sixteen"),
    [
        (GATED, 1, 1, False),
        (GATED, 2, 1, True),
        (GATED, 3, 1, False),
        (GATED, 3, -1, True),
        (WINDOWED, 2, 1, False),
    ],
)
def test_all_ways_are_those_of_a_whole_run(
    mixer: dict[str, Any],
    kept: int,
    sign: int,
    sixteen: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever is kept, and whether plain outputs come nearer or not; on sequences that were not fitted."""
    source = blocked.teacher(tmp_path / "teacher", layers=3)
    recipe = blocked.recipe(source, calibrate=512, window_dropout=0.0)
    recipe.mixer, recipe.layers = mixer, [0, 2]
    if sixteen:
        recipe.run.precision = "bf16"
    tried: list[list[str]] = []

    def nearest(away: dict[str, float]) -> str:
        tried.append(list(away))
        return tried[-1][kept]

    over = whole.over
    monkeypatch.setattr(whole, "over", lambda found: sign * over(found))
    monkeypatch.setattr(whole, "nearest", nearest)
    job = Job(source, recipe, tmp_path / "run")
    job.folder.path.mkdir()
    job.begin(1, None)
    calibrate(job)
    model: Any = surgery.convert(load_teacher(source)[0], recipe.mixer, recipe.layers)
    torch.manual_seed(recipe.run.seed)
    surgery.reset_mixers(model)
    found = whole.calibrate(model, whole.text(recipe, job.tokenizer), autocast=job.autocast)
    expected = whole.state(model)
    whole.restore(model, job.calibration)
    assert all(torch.equal(value, expected[name]) for name, value in whole.state(model).items())
    assert json.loads((job.calibration / whole.DONE).read_text())["layers"] == found
    assert tried[0] == tried[1] and len(tried[0]) == (6 if mixer is WINDOWED else 4)
    assert ("window alone" in tried[0]) == (mixer is WINDOWED)


@pytest.mark.parametrize("checked", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_checkpoint_written_tensor_by_tensor(
    family: str, checked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the check in a fresh process, which takes most of the time, or without."""
    source = blocked.teacher(tmp_path / "teacher", layers=2)
    if family != "llama":
        made = tiny.model(family, vocab_size=259, num_hidden_layers=2, tie_word_embeddings=True)
        made.save_pretrained(source)
    recipe, out = blocked.recipe(source), tmp_path / "run"
    blocked.in_blocks(source, recipe, out, size=2)
    save = exporting.export.save
    monkeypatch.setattr(
        exporting.export, "save", lambda *args, **given: save(*args, **{**given, "check": checked})
    )
    path = exporting.checkpoint(Job(source, recipe, out))
    assert path == out / "checkpoint"
    found: Any = AutoModelForCausalLM.from_pretrained(path)
    teacher: Any = AutoModelForCausalLM.from_pretrained(source)
    ids = torch.arange(20)[None] % 250
    with torch.no_grad(), surgery.mode(found, "teacher"):
        torch.testing.assert_close(found(ids).logits, teacher(ids).logits)
    from linearize.distill.pieces import Pieces

    result = Pieces(out / "stage-1-transfer/final.safetensors")
    state = surgery.mixer_state(found)
    assert sorted(state) == sorted(result.shapes)
    assert all(torch.equal(state[name], result.whole(name)) for name in state)


def test_other_stages_come_before_the_checkpoint(tmp_path: Path) -> None:
    source = blocked.teacher(tmp_path / "teacher", layers=2)
    recipe, out = blocked.recipe(source, stages=3), tmp_path / "run"
    write(Job(source, recipe, out), size=2)
    with pytest.raises(
        LinearizeError, match=r"stage 'recover' is still to be trained: go on with linearize run"
    ):
        exporting.checkpoint(Job(source, recipe, out))
