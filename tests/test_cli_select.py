"""`linearize select` on a tiny model: what it writes composes and keeps the layers, and what it refuses."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import pytest
import yaml
from byte_llama import TEXT, byte_tokenizer, tiny_llama

from linearize import cli
from linearize.config import compose
from linearize.config.words import ranges


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(layers=4).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


SMALL = ["--tokens", "256", "--windows", "2", "--length", "64", "--draws", "1"]


@pytest.fixture
def small(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return [*SMALL, "--out", str(tmp_path / "out")]


def select(*arguments: object) -> int:
    return cli.main(["select", *map(str, arguments)])


def test_the_recipe_that_it_writes_keeps_the_layers(teacher, small, tmp_path, capsys):
    assert select(teacher, "lolcats", "--keep", 2, *small) == 0
    said = capsys.readouterr()
    assert "2 of 4 layers stay softmax" in said.err and "about" in said.err and "placements 100%" in said.err
    written = tmp_path / "out" / "lolcats-keep2.yaml"
    kept = yaml.safe_load(written.read_text())["layers"]["keep"]
    assert f"Softmax stays in {', '.join(map(str, kept))}." in said.out and len(kept) == 2
    recipe = compose(written)
    assert recipe.layers == {"keep": kept} and recipe.stages == compose("lolcats").stages
    assert (tmp_path / "out" / "lolcats-keep2.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "out" / "scores.json").read_text())["rows"]
    assert {row["metric"] for row in rows} == {"kl", "kl_hit"}
    assert {row["role"] for row in rows} >= {
        "all converted",
        "layer 0 converted",
        f"softmax in {kept[0]}, {kept[1]}",
    }

    assert cli.main(["inspect", str(teacher), str(written)]) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if "(stay" in line)
    assert f" {ranges(kept)} " in line and "converted   2 of 4 attention layers" in shown

    before = (tmp_path / "out" / "scores.json").read_bytes()
    assert select(teacher, "lolcats", "--keep", 2, *small) == 0
    again = capsys.readouterr()
    assert again.out == said.out and (tmp_path / "out" / "scores.json").read_bytes() == before
    assert "transfer" not in again.err  # the alignment is there already

    (aligned,) = (tmp_path / "out" / "alignment").glob("*/final.safetensors")
    aligned.write_bytes(b"cut off")
    assert select(teacher, "lolcats", "--keep", 2, *small) == 0
    once_more = capsys.readouterr()
    assert once_more.out == said.out and "is damaged: the alignment is made again" in once_more.err

    (calibrated,) = (tmp_path / "out" / "calibration").glob("*/final.safetensors")
    kept = calibrated.read_bytes()
    calibrated.write_bytes(b"cut off")
    assert select(teacher, "lolcats", "--keep", 2, *small) == 0
    assert "is damaged: the calibration is made again" in capsys.readouterr().err
    assert calibrated.read_bytes() == kept


def test_overrides_and_files_are_spelled_out(teacher, small, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"defaults: [liger_gla, _self_]\ndata: {{source: {text}, validation: {text}}}\n")
    assert select(teacher, mine, "mixer.window.size=8", *small) == 0
    assert (
        "no stage with a loss per layer: mixers are scored as calibration sets them"
        in capsys.readouterr().err
    )
    recipe = compose(tmp_path / "out" / "mine-keep1.yaml")
    assert recipe.mixer["window"]["size"] == 8 and recipe.data.source == str(text)
    assert len(recipe.layers["keep"]) == 1


@pytest.mark.slow
def test_evenly_spaced_layers_are_chosen_anew_and_as_many(teacher, small, tmp_path, capsys):
    """What such a recipe says is how many; which ones is what select is asked for."""
    shipped = compose("mamba_in_llama")
    assert shipped.layers == {"every": 2}
    assert select(teacher, "mamba_in_llama", *small) == 0
    recipe = compose(tmp_path / "out" / "mamba_in_llama-keep2.yaml")
    assert list(recipe.layers) == ["keep"] and len(recipe.layers["keep"]) == 2
    assert (recipe.mixer, recipe.stages) == (shipped.mixer, shipped.stages)
    assert select(teacher, "lolcats", "layers={every: 2}", *small[:-1], str(tmp_path / "other")) == 0
    assert len(compose(tmp_path / "other" / "lolcats-keep2.yaml").layers["keep"]) == 2
    capsys.readouterr()
    assert select(teacher, "lolcats", "layers=[0,1,2]", *small) == 2
    assert "chooses already" in capsys.readouterr().err


def test_the_chosen_layers_get_a_mixer_of_the_recipe(teacher, small, tmp_path, capsys):
    assert select(teacher, "halo", "--give", "nope", "--keep", 2, *small) == 0
    said = capsys.readouterr()
    written = tmp_path / "out" / "halo-keep2.yaml"
    recipe, shipped = compose(written), compose("halo")
    (name,) = recipe.layers["use"]
    chosen = recipe.layers["use"][name]
    assert name == "nope" and set(recipe.layers) == {"use"} and len(chosen) == 2
    assert f"Layers {chosen[0]}, {chosen[1]} get nope." in said.out
    assert recipe.mixers == shipped.mixers and recipe.stages == shipped.stages
    assert cli.main(["inspect", str(teacher), str(written)]) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if "full softmax, no RoPE" in line)
    assert f" {ranges(chosen)} " in line and "converted   4 of 4 attention layers" in shown

    mine = tmp_path / "mine.yaml"
    mine.write_text("defaults: [based_alternating, _self_]\nmixer: {feature_map: {dim: 8}}\n")
    assert select(teacher, mine, "--give", "window", *small) == 0
    assert list(compose(tmp_path / "out" / "mine-keep1.yaml").layers["use"]) == ["window"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["halo"], "chooses already.*--give nope to choose who gets that mixer"),
        (["halo", "--give", "nop"], "--give nop: the recipe has no such mixer; did you mean 'nope'"),
        (["lolcats", "--give", "nope"], "--give nope: the recipe has no such mixer; mixers: names none"),
        (
            [
                "halo",
                "--give",
                "nope",
                "mixers.near={feature_map: none, window: {name: sliding}}",
                "layers.use.near=[0]",
            ],
            "the recipe gives layers to near too; take that out .~mixers.near ~layers.use.near",
        ),
        (
            ["halo", "--give", "nope", "layers.keep=[0]"],
            "keeps softmax in some layers.*layers={use: {nope: {every: 4",
        ),
        (
            ["lolcats", "--keep", "4"],
            "--keep 4: .*tiny has 4 attention layers, of which 1 to 3 can stay softmax",
        ),
        (["lolcats", "--keep", "0"], "must be a whole number above 0"),
        (["lolcats", "--tokens", "many"], "must be a whole number such as 20k"),
        (["lolcats", "--length", "100000000"], "shorter than one window of 100000000.*"),
        (["lolcats", "layers=LSLS"], "chooses already.*layers=all"),
        (["lolcats", "layers={keep: [1]}"], "chooses already"),
        (["lolcat"], "did you mean 'lolcats'"),
        (["lolcats", "--by", "recal"], "did you mean 'recall'"),
    ],
)
def test_what_is_refused(teacher, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert select(teacher, *arguments, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert re.search(message, said, re.DOTALL), said
    assert not (tmp_path / "out").exists()


def test_a_model_of_one_layer_is_refused(tmp_path, small, capsys):
    tiny_llama(layers=1).save_pretrained(tmp_path / "one")
    byte_tokenizer().save_pretrained(tmp_path / "one")
    assert select(tmp_path / "one", "lolcats", *small) == 2
    assert "1 attention layer: there is nothing to choose among" in capsys.readouterr().err


def test_a_stopped_choice_goes_on(teacher, small, tmp_path, monkeypatch, capsys):
    from linearize.select.scoring import Scorer

    measured = []
    tokens = Scorer._tokens

    def stops(self, kept, text):
        if len(measured) == 4:
            raise KeyboardInterrupt
        measured.append(kept)
        return tokens(self, kept, text)

    with monkeypatch.context() as context:
        context.setattr(Scorer, "_tokens", stops)
        assert select(teacher, "lolcats", *small) == 130
    assert "The same command goes on" in capsys.readouterr().err
    rows = json.loads((tmp_path / "out" / "scores.json").read_text())["rows"]
    assert len(rows) == 8
    assert select(teacher, "lolcats", *small) == 0
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["rows"][:8] == rows


@pytest.mark.slow
def test_a_run_takes_the_recipe(teacher, small, tmp_path, capsys):
    from linearize import load, surgery

    assert select(teacher, "lolcats", "--keep", 2, *small) == 0
    written = tmp_path / "out" / "lolcats-keep2.yaml"
    kept = yaml.safe_load(written.read_text())["layers"]["keep"]
    less = ["data.length=48", "eval.length=48", "eval.max_windows=1", "stages.*.tokens=96"]
    less += ["stages.*.batch_size=1", "eval.ablations=false"]
    assert cli.main(["run", str(teacher), str(written), *less, "--out", str(tmp_path / "run")]) == 0
    model = load(tmp_path / "run" / "checkpoint")
    assert sorted([*kept, *(layer.layer_idx for layer in surgery.converted(model))]) == [0, 1, 2, 3]

    # what it made is no model that layers could be chosen of
    capsys.readouterr()
    assert select(tmp_path / "run" / "checkpoint", "lolcats", *SMALL, "--out", tmp_path / "again") == 2
    said = capsys.readouterr().err
    assert "the model is converted already" in said and not (tmp_path / "again").exists()
    # nor one to look at, or to run, of which is said so before anything is read, measured or written
    for line in (["inspect"], ["run", "--out", str(tmp_path / "again")]):
        assert cli.main([line[0], str(tmp_path / "run" / "checkpoint"), "lolcats", *line[1:]]) == 2
        said = capsys.readouterr().err
        assert said.startswith("the model is converted already") and not (tmp_path / "again").exists()


def test_pass_keys_choose_where_they_fit(teacher, small, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:700])  # two windows, whatever is asked for
    longer = [f"data.validation={text}", "--tokens", "256", "--draws", "1", *small[-2:]]
    longer += ["--length", "300", "--windows", "2000000000"]
    assert select(teacher, "swa_sinks", "--by", "passkey", *longer) == 0
    said = capsys.readouterr()
    assert "fills 2 of 4000000000 windows" in said.err
    assert "Placements at equal budget, passkey" in said.out
    assert "The teacher itself does not know the pass keys" in said.out
    assert {path.name for path in (tmp_path / "out").glob("swa_sinks*")} == {
        "swa_sinks-keep1-passkey.yaml",
        "swa_sinks-keep1-passkey.png",
    }
    rows = json.loads((tmp_path / "out" / "scores.json").read_text())["rows"]
    assert {row["task"] for row in rows} == {"text: choice", "passkey: choice", "passkey: unseen"}

    assert select(teacher, "swa_sinks", *small) == 0
    said = capsys.readouterr()
    assert "no pass keys at --length 64: the item alone has" in said.err and "pass keys" not in said.out
    assert select(teacher, "swa_sinks", "--by", "passkey", *small) == 2
    assert re.search("--by passkey: .* take a larger --length", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("tokens", "tokens.*could not be written"),
        ("swa_sinks-keep1.png", "swa_sinks-keep1.png.*could not be written"),
        ("swa_sinks-keep1.yaml", "swa_sinks-keep1.yaml.*could not be written"),
        ("scores.json", "Delete scores.json to measure again"),
        ("full", "the disk is full"),
    ],
)
def test_what_cannot_be_written_or_read_is_said(
    teacher, small, tmp_path, monkeypatch, capsys, place, message
):
    out = tmp_path / "out"
    out.mkdir()
    if place == "tokens":
        (out / place).write_text("")
    elif place == "scores.json":
        (out / place).write_text("{")
    elif place == "full":
        full = OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr("linearize.storing.write_tensors", raising(full))
    else:
        (out / place).mkdir()
    assert select(teacher, "swa_sinks", *small) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and re.search(message, said), said


def raising(error: Exception):
    def raises(*args: object) -> None:
        raise error

    return raises


def test_a_checkpoint_under_another_name_gets_a_remedy_that_select_has(teacher, small, tmp_path, capsys):
    """The alignment is a stage as a run's, whose remedies name --resume; select goes on with the same command."""
    from linearize import storing

    assert select(teacher, "lolcats", *small) == 0
    [stage] = (tmp_path / "out" / "alignment").iterdir()
    (stage / "done.json").unlink()

    def fill(folder):
        (folder / storing.STATE).write_text(json.dumps({"global_step": 2}))

    storing.write_folder(stage / "checkpoint-7", fill)
    capsys.readouterr()
    assert select(teacher, "lolcats", *small) == 2
    said = capsys.readouterr().err
    assert "holds step 2" in said and "give the command again, a run with --resume" in said
