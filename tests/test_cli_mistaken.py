"""A recipe where a model is meant, and a model where a recipe is: told by every command, and no hub is asked."""

from __future__ import annotations

from pathlib import Path

import byte_llama
import pytest

from linearize import cli
from linearize.config import list_recipes
from linearize.errors import ModelNotFoundError
from linearize.models import hub, resolve, resolve_config
from linearize.models.aliases import ALIASES

ALIAS = next(iter(ALIASES))


@pytest.fixture(autouse=True)
def away(monkeypatch, tmp_path):
    """A folder with a model, a run and a recipe in it, and no hub."""

    def asked(name, *_, **__):
        raise ModelNotFoundError(f"the hub was asked for {name}")

    monkeypatch.setattr(hub, "_snapshot", asked)
    monkeypatch.setattr(hub, "_local", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    byte_llama.tiny_llama().save_pretrained("model")
    byte_llama.byte_tokenizer().save_pretrained("model")
    for name in ("runs/model-lolcats", "runs/model-demo"):
        Path(name).mkdir(parents=True)
        Path(name, "recipe.yaml").write_text("defaults: [lolcats]\n")
    Path("runs/model-lolcats/checkpoint").mkdir()
    Path("mine.yaml").write_text("defaults: [lolcats]\n")


def told(capsys, *line: str) -> str:
    assert cli.main(list(line)) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "Traceback" not in shown.err and "hub was asked" not in shown.err
    return shown.err


@pytest.mark.parametrize(
    "line",
    [
        ["run", "lolcats", "demo"],
        ["inspect", "lolcats", "demo"],
        ["plan", "lolcats", "demo"],
        ["select", "lolcats", "hedgehog"],
        ["run", "model", "lolcats", "run.teacher=lolcats"],
        ["eval", "lolcats"],
        ["eval", "model", "--against", "lolcats"],
        ["eval", "model", "--control", "lolcats"],
        ["generate", "lolcats", "--prompt", "a"],
        ["generate", "model", "--prompt", "a", "--draft", "lolcats"],
        ["serve", "lolcats", "--port", "0"],
        ["sample", "lolcats"],
        ["export", "lolcats", "--quantize", "int8"],
        ["push", "lolcats", "me/model", "--dry-run"],
    ],
    ids=" ".join,
)
def test_a_recipe_as_a_model(capsys, line):
    said = told(capsys, *line)
    assert "no model 'lolcats': that is a recipe, by which a model is made" in said
    assert "runs holds model-lolcats)" in said and "write lolcats@main" in said
    assert said.startswith("--draft: ") == ("--draft" in line)


def test_every_recipe_and_what_is_near_to_one(monkeypatch):
    for name, _ in list_recipes():
        with pytest.raises(ModelNotFoundError, match=f"'{name}': that is a recipe"):
            resolve(name)
    for name in ("Lolcats", "lolcat"):
        with pytest.raises(ModelNotFoundError, match=f"'{name}': 'lolcats' is a recipe"):
            resolve_config(name)
    for name in ("gpt2", "distilgpt2", "openai-gpt", "lolcats@main", "me/lolcats"):
        with pytest.raises(ModelNotFoundError, match="the hub was asked"):
            resolve(name)
    monkeypatch.setattr(hub, "_local", lambda *_: Path("model"))
    assert resolve("lolcat") == Path("model")  # here already, from the hub


@pytest.mark.parametrize(
    ("file", "more"), [("mine.yaml", "given here)\n"), ("runs/model-lolcats/recipe.yaml", "has been made by it")]
)  # fmt: skip
def test_a_recipe_file_as_a_model(capsys, file, more):
    said = told(capsys, "generate", file, "--prompt", "a")
    assert f"no model '{file}': a YAML file can be a recipe" in said and more in said


@pytest.mark.parametrize(
    ("recipe", "what"),
    [
        (ALIAS, f"'{ALIAS}' is a model"),
        ("./model", "'./model' is the folder of a model"),
        ("model", "'model' is the folder of a model"),
        ("runs/model-demo", "is the folder of a run, whose recipe is runs/model-demo/recipe.yaml"),
        ("some.gguf", "'some.gguf' is a model"),
    ],
)
@pytest.mark.parametrize(
    "command", ["run", "inspect", "plan", "select", "blocks plan", "launch node", "recipes show"]
)
def test_a_model_as_a_recipe(capsys, recipe, what, command):
    for model in ("lolcats", "mine.yaml", "model"):
        line = [*command.split(), *([] if command == "recipes show" else [model]), recipe]
        said = told(capsys, *line)
        assert what in said and "unknown recipe" not in said
        swapped = model != "model" and command != "recipes show"
        assert (f"MODEL comes first, then RECIPE; '{model}' is a recipe" in said) == swapped
        assert ("RECIPE is the name of a shipped one" in said) != swapped


def test_what_is_wrong_in_a_recipe_is_no_confusion(capsys):
    Path("mine.yaml").write_text("defaults: [lolcats]\nlayerz: all\n")
    assert (
        "layerz: unknown key" in (said := told(capsys, "run", "lolcats", "mine.yaml")) and "MODEL" not in said
    )
