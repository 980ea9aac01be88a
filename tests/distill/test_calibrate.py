"""The stage of closed forms in a run: reported, written, read back bit by bit, and absent where it is not asked for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from byte_llama import byte_tokenizer, tiny_llama
from safetensors.torch import load_file
from torch import Tensor

from linearize import config, distill, load, surgery
from linearize.config import compose, list_recipes
from linearize.config.schema import Recipe
from linearize.distill import calibrate
from linearize.distill.continuing import changes
from linearize.errors import CheckpointError, DataError, NotFiniteError


def perplexities(out: Path) -> dict[str, float]:
    rows = json.loads((out / "results.json").read_text())["rows"]
    return {row["name"]: row["perplexity"]["held-out"] for row in rows}


def found(recipe: Recipe) -> tuple[Any, list[Any]]:
    torch.manual_seed(0)
    model = surgery.convert(tiny_llama(), recipe.mixer, recipe.layers)
    return model, calibrate.calibrate(model, calibrate.text(recipe, byte_tokenizer()), autocast=None)


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in surgery.mixer_state(model).items()}


def test_every_shipped_recipe_asks_for_it_and_one_option_takes_it_out():
    for name, _ in list_recipes():
        assert compose(name).calibrate.tokens > 0
        assert compose(name, ["calibrate.tokens=0"]).calibrate.tokens == 0
    assert Recipe().calibrate.tokens == 0


def test_a_run_with_it_and_one_without(
    teacher_folder: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make_recipe(tokens=4 * 2 * 64)
    del recipe.stages["recover"]
    recipe.eval.ablations = False
    distill.run(str(teacher_folder), recipe, tmp_path / "without")
    recipe.calibrate.tokens = 512
    distill.run(str(teacher_folder), recipe, tmp_path / "with")
    without, having = perplexities(tmp_path / "without"), perplexities(tmp_path / "with")
    assert list(without) == ["teacher", "swapped, untrained", "after transfer"]
    assert list(having) == ["teacher", "swapped, untrained", "calibrated", "after transfer"]
    assert having["swapped, untrained"] == without["swapped, untrained"]
    assert having["after transfer"] != without["after transfer"]
    assert not (tmp_path / "without" / "stage-0-calibrate").exists()
    said = json.loads((tmp_path / "with" / "stage-0-calibrate" / "done.json").read_text())
    assert [layer["layer"] for layer in said["layers"]] == [0, 1]
    assert all(layer["after"] <= layer["before"] for layer in said["layers"])
    assert "calibrated" in (tmp_path / "with" / "report.md").read_text()


def test_it_may_be_all_that_a_run_does(
    teacher_folder: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    assert compose("lolcats", ["~stages"]).stages == {}
    recipe = make_recipe(tokens=4 * 2 * 64)
    recipe.stages, recipe.calibrate.tokens = {}, 512
    done = distill.run(str(teacher_folder), recipe, tmp_path / "run")
    rows = perplexities(tmp_path / "run")
    assert list(rows)[:3] == ["teacher", "swapped, untrained", "calibrated"]
    loaded = surgery.mixer_state(load(done.checkpoint))
    kept = load_file(tmp_path / "run" / "stage-0-calibrate" / "final.safetensors")
    assert loaded and all(torch.equal(loaded[name], kept[name].to(value)) for name, value in loaded.items())


def test_a_run_goes_on_behind_it(
    teacher_folder: Path, make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off between the calibration and the first stage, it ends as the run that was not."""
    recipe = make_recipe(tokens=4 * 2 * 64)
    recipe.eval.ablations = False
    recipe.calibrate.tokens = 512
    distill.run(str(teacher_folder), recipe, tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(
            "linearize.distill.stages.train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(distill.RunStopped):
            distill.run(str(teacher_folder), recipe, tmp_path / "cut")
    monkeypatch.setattr(calibrate, "calibrate", lambda *_, **__: pytest.fail("calibrated twice"))
    distill.run(str(teacher_folder), recipe, tmp_path / "cut", resume=True)
    assert perplexities(tmp_path / "cut") == perplexities(tmp_path / "whole")


def test_it_repeats_bit_by_bit_and_reads_back_bit_by_bit(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make_recipe()
    recipe.calibrate.tokens = 512
    model, layers = found(recipe)
    again, same = found(recipe)
    assert layers == same
    first, second = state(model), state(again)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    calibrate.write(model, tmp_path / "stage", layers)
    assert calibrate.is_done(tmp_path / "stage")
    fresh = surgery.convert(tiny_llama(), recipe.mixer, recipe.layers)
    calibrate.restore(fresh, tmp_path / "stage")
    assert all(torch.equal(value, first[name]) for name, value in state(fresh).items())
    (tmp_path / "stage" / calibrate.FINAL).write_bytes(
        (tmp_path / "stage" / calibrate.FINAL).read_bytes()[:-1] + b"\x01"
    )
    with pytest.raises(CheckpointError, match=r"stage.*go on with --resume"):
        calibrate.restore(fresh, tmp_path / "stage")


GATED = {
    "feature_map": {"name": "identity", "l2_normalize": True},
    "gate": {"name": "mamba2"},
    "update": {"name": "delta"},
    "normalizer": {"name": "none"},
    "output": {"name": "gate", "rank": 4},
}


def test_ways_are_judged_on_what_was_not_fitted(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start, the teacher's inputs, the same with plain outputs, and the own stream as plain as what came nearer."""
    recipe = make_recipe()
    recipe.mixer, recipe.calibrate.tokens = GATED, 1024
    ways: list[tuple[bool, dict[str, bool]]] = []
    texts: dict[str, Tensor] = {}
    made = calibrate._pass

    def passing(model: Any, batch: dict[str, Tensor], own: bool, meter: Any, **how: bool) -> Any:
        ways.append((own, how))
        texts["fitted"] = batch["input_ids"]
        return made(model, batch, own, meter, **how)

    nearness = iter([5.0, 4.0, 3.0, 3.5])

    def away(model: Any, batch: dict[str, Tensor]) -> float:
        texts["judged"] = batch["input_ids"]
        return next(nearness)

    monkeypatch.setattr(calibrate, "_pass", passing)
    monkeypatch.setattr(calibrate, "_divergence", away)
    model, layers = found(recipe)
    assert ways == [
        (False, {}),
        (False, {"plain": True, "sizes_only": True}),
        (True, {"plain": True}),
    ]
    whole = calibrate.text(recipe, byte_tokenizer())
    assert len(texts["judged"]) == len(whole) // 8 > 0
    given = torch.stack([whole[index]["input_ids"] for index in range(len(whole))])
    assert torch.equal(torch.cat([texts["fitted"], texts["judged"]]), given)
    plain = state(model)
    assert not any(value[1:].any() for name, value in plain.items() if name.endswith("output.up"))
    nearness = iter([5.0, 3.0, 4.0, 3.5])
    ways.clear()
    model, layers = found(recipe)
    assert ways[-1] == (True, {"plain": False})
    assert any(value[1:].any() for name, value in state(model).items() if name.endswith("output.up"))
    nearness = iter([2.0, 3.0, 4.0, 3.5])
    model, layers = found(recipe)
    assert layers == []
    assert not any(value.any() for name, value in state(model).items() if name.endswith("output.up"))


def test_a_teacher_that_overflows_is_refused_by_layer(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe()
    recipe.calibrate.tokens = 256
    model = surgery.convert(tiny_llama(), recipe.mixer, recipe.layers)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = float("inf")
    with pytest.raises(NotFiniteError, match=r"layer 1: the teacher's keys .* calibrate\.tokens=0"):
        calibrate.calibrate(model, calibrate.text(recipe, byte_tokenizer()), autocast=None)


def test_a_student_that_overflows_leaves_the_teachers_inputs(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    recipe.calibrate.tokens = 256
    halves = calibrate._halves

    def overflowing(call: Any) -> tuple[Any, Any]:
        teacher, student = halves(call)
        return teacher, dataclasses.replace(student, k=student.k * float("inf"))

    monkeypatch.setattr(calibrate, "_halves", overflowing)
    model, layers = found(recipe)
    assert layers and all(layer["after"] < layer["before"] for layer in layers)
    assert all(value.isfinite().all() for value in state(model).values())


def test_its_text_is_read_before_anything_is_written(
    teacher_folder: Path, make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no stage reads it; a mixer without parameters asks for none."""
    recipe = make_recipe()
    recipe.stages.clear()
    recipe.calibrate.tokens = 256
    recipe.data.source = str(tmp_path / "gone.txt")

    def loaded(*_: object, **__: object) -> None:
        raise CheckpointError("weights are loaded")

    monkeypatch.setattr("linearize.models.load_teacher", loaded)
    with pytest.raises(DataError, match=r"gone\.txt"):
        distill.run(str(teacher_folder), recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    recipe.mixer = {"window": {"name": "sliding", "size": 8}}
    with pytest.raises(CheckpointError, match="weights are loaded"):
        distill.run(str(teacher_folder), recipe, tmp_path / "run")


def test_a_run_from_before_has_none(make_recipe: Callable[..., Recipe]) -> None:
    new = yaml.safe_load(config.to_yaml(make_recipe()))
    old = {key: value for key, value in new.items() if key != "calibrate"}
    assert not changes(old, new).accepted and not changes(old, new).refused
    new["calibrate"]["tokens"] = 512
    assert changes(old, new).refused == ["calibrate.tokens: 0 -> 512"]


def test_a_constant_alone_asks_for_no_plain_way():
    """It is set in every way, so that a plain one would be the full one once more."""
    name = "model.layers.0.self_attn.mixer.output."
    assert not calibrate.has_outputs(
        [f"{name}constant", "model.layers.0.self_attn.mixer.recurrent.update.scale"]
    )
    assert calibrate.has_outputs([f"{name}constant", f"{name}up"])


def test_a_window_that_comes_nearer_alone_is_left_alone(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the distributions of the whole model: what branches lower in their own layers may not lower that."""
    recipe = make_recipe()
    combine = {"name": "shared_normalizer", "complement": True}
    recipe.mixer = {**recipe.mixer, "combine": combine}
    recipe.calibrate.tokens = 512
    assert calibrate.has_windows(state(surgery.convert(tiny_llama(), recipe.mixer, recipe.layers)))
    nearness = iter([5.0, 3.0, 3.0, 3.0, 2.0, 4.0])
    monkeypatch.setattr(calibrate, "_divergence", lambda model, batch: next(nearness))
    alone, layers = found(recipe)
    assert [layer["layer"] for layer in layers] == [0, 1]
    nearness = iter([5.0, 3.0, 3.5, 3.5, 3.5, 4.0])
    model, _ = found(recipe)
    shut, fitted = state(alone), state(model)
    changed = {name for name, value in shut.items() if not torch.equal(value, fitted[name])}
    assert changed == {name for name in shut if name.endswith("combine.window_factor")}
    text = calibrate.text(recipe, byte_tokenizer())[0]["input_ids"][None]
    windows = surgery.convert(
        tiny_llama(), {"window": recipe.mixer["window"], "feature_map": {"name": "none"}}, recipe.layers
    )
    with torch.no_grad():
        expected = windows(text).logits
        torch.testing.assert_close(alone(text).logits, expected, rtol=0.01, atol=0.01)
        assert not torch.allclose(model(text).logits, expected, rtol=0.01, atol=0.01)
