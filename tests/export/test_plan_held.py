"""What `config.linearize` says of a recipe or a model: edited, it is refused by name, wherever it is read."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

import linearize
from linearize import export, surgery
from linearize.errors import CheckpointError

Config = dict[str, Any]
WAYS = ("load", "auto", "remote")
PLACE = "model.layers.1.self_attn"
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "long_factor": [1.5] * 4,
    "short_factor": [1.1] * 4,
    "original_max_position_embeddings": 128,
    "factor": 4.0,
}
MODELS: dict[str, tuple[str, Config]] = {
    "llama": ("llama", {}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    "longrope": ("phi3", {"rope_parameters": LONG}),
    "qwen3": ("qwen3", {}),
    "partial": ("gpt_neox", {"rope_parameters": PARTIAL}),
    "no positions": ("smollm3", {}),
}
RECIPE: Config = {
    "mixer": tiny.LOLCATS,
    "mixers": {"longer": {"window": {"size": 12}}},
    "layers": {"use": {"longer": [1, 2]}},
}
SCRIPT = """
import json, os, sys
if sys.argv[1] != "remote":
    import linearize
from transformers import AutoModelForCausalLM
said = []
for folder in sys.argv[2:]:
    try:
        if sys.argv[1] == "load":
            linearize.load(folder)
        else:
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=sys.argv[1] == "remote")
        said.append("")
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
os.write(1, ("\\n" + json.dumps(said)).encode())
"""


def first(config: Config) -> Config:
    plan = config["linearize"]["layers"]
    return plan[next(path for path in sorted(plan) if ".1." in path)]


def theta(config: Config) -> None:
    """Ten times smaller wherever it stands."""
    rope = config["rope_parameters"]
    for held in rope.values() if "rope_theta" not in rope else [rope]:
        held["rope_theta"] /= 10


def all_longer(config: Config) -> None:
    for numbers in config["linearize"]["layers"].values():
        numbers["mixer"] = "longer"


def tables(made: Callable[[list[float]], list[float]]) -> Callable[[Config], None]:
    def edit(config: Config) -> None:
        plan = config["linearize"]
        plan["turns"] = [made(table) for table in plan["turns"]]

    return edit


def softmax(config: Config) -> None:
    """A layer is taken out of a plan whose mixers hold nothing that would be left over."""
    plan = config["linearize"]["layers"]
    del plan[PLACE]


EDITS: dict[str, tuple[Callable[[Config], Any], tuple[str, ...], str]] = {
    "mixer of a layer": (
        lambda config: first(config).update(mixer="default"),
        ("llama", "longrope", "no positions"),
        r"layers\.\S*\.mixer: default, and linearize\.json that the layer was trained with longer",
    ),
    "one mixer for all": (
        all_longer,
        ("llama", "gemma3"),
        r"mixer: longer, and linearize\.json .* trained with default",
    ),
    "theta": (
        theta,
        ("llama", "yarn", "gemma2", "gemma3", "partial"),
        r"turns\[\d\] \(layers\.\S*\.turns\): pair \d turns by \S+ a token, and the model's .* turns it by",
    ),
    "kind of rotation": (
        lambda config: config.update(rope_parameters=DYNAMIC),
        ("llama", "qwen3"),
        r"turns: .* fixed angles, and rope_parameters names dynamic",
    ),
    "a table of one pair": (
        tables(lambda table: [1.0]),
        ("llama", "partial"),
        r"turns\[0\] .*: has 1 pairs of dims, and the model's rotary embedding turns \d",
    ),
    "another table": (
        tables(lambda table: [0.5] * len(table)),
        ("llama", "yarn"),
        r"turns\[0\] .*: pair 0 turns by 0\.5 a token",
    ),
    "a table that nobody had": (
        lambda config: config["linearize"].update(turns=[*config["linearize"]["turns"], [1.0]]),
        ("llama",),
        r"turns\[1\]: no layer names it",
    ),
    "the other table": (
        lambda config: first(config).update(turns=1 - first(config)["turns"]),
        ("gemma3",),
        r"turns: is 0, the table of other layers; this one's first pairs turn by",
    ),
    "no table": (
        lambda config: first(config).pop("turns"),
        ("llama",),
        r"turns: is missing, and the layer is given a rotary embedding",
    ),
    "way of turning": (
        lambda config: first(config).update(rotary="none", turns=None),
        ("llama", "partial"),
        r"rotary: is none, and the layer's own is half",
    ),
    "another way": (
        lambda config: first(config).update(rotary="pairs", turns=None),
        ("qwen3", "longrope"),
        r"rotary: is pairs, and the layer's own is half",
    ),
    "scaling": (
        lambda config: first(config).update(scaling=0.3),
        ("llama", "gemma2", "longrope"),
        r"scaling: is 0\.3, and the model's own layer has",
    ),
    "softcap": (
        lambda config: first(config).update(softcap=5.0),
        ("gemma2",),
        r"softcap: is 5\.0, and the model's own layer has 2\.0",
    ),
    "sliding window": (
        lambda config: first(config).update(sliding_window=5),
        ("llama", "gemma2", "gemma3"),
        r"sliding_window: is 5, and the model's own layer has",
    ),
    "width of heads": (
        lambda config: first(config).update(value_dim=2),
        ("gemma2", "longrope"),
        r"value_dim: is 2, and the model's own layer has|do not fit",
    ),
}
CASES = [(name, model) for name, (_, models, _) in EDITS.items() for model in models]
EVERYWHERE: list[Any] = [
    "llama",
    ("theta", "llama"),
    ("the other table", "gemma3"),
    ("scaling", "llama"),
]
"""What every way of loading is tried with; the others `linearize.load` alone."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each model by its name."""
    place = tmp_path_factory.mktemp("written")
    for name, (family, changes) in MODELS.items():
        model = surgery.convert(
            tiny.model(family, **changes), RECIPE["mixer"], RECIPE["layers"], RECIPE["mixers"]
        )
        linearize.save(model, place / name, recipe=RECIPE, remote_code=name in ("llama", "gemma3"))
    return place


def edited(folder: Path, change: Callable[[Config], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def said(written: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[Any, str]]:
    """What a fresh process says of each checkpoint, by each way of loading; nothing where it loads."""
    place = tmp_path_factory.mktemp("edited")
    folders: dict[Any, Path] = {name: written / name for name in MODELS}
    for number, (name, model) in enumerate(CASES):
        folders[name, model] = Path(shutil.copytree(written / model, place / str(number)))
        edited(folders[name, model], EDITS[name][0])
    found = {}
    for way in WAYS:
        given = {key: x for key, x in folders.items() if way == "load" or key in EVERYWHERE}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, way, *map(str, given.values())],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "HF_MODULES_CACHE": str(place / "modules")},
        )
        found[way] = dict(zip(given, json.loads(done.stdout.splitlines()[-1]), strict=True))
    return found


@pytest.mark.parametrize("model", MODELS)
def test_what_was_written_loads(said, model):
    assert {answers[model] for answers in said.values() if model in answers} == {""}


@pytest.mark.parametrize(("name", "model"), CASES)
def test_an_edit_is_refused_by_name(said, name, model):
    _, _, message = EDITS[name]
    for way in WAYS if (name, model) in EVERYWHERE else WAYS[:1]:
        answer = said[way][name, model]
        assert re.search(message, answer), (way, answer)
        assert answer.startswith("CheckpointError: "), way
        assert "again" in answer, "the remedy"


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy of the Llama that the test may change."""
    return Path(shutil.copytree(written / "llama", tmp_path / "out"))


def test_layers_of_other_mixers_that_hold_the_same_tensors(tmp_path):
    """Windows hold no parameters: a plan that leaves one out, or puts one in, fits the weights."""
    window = {"window": {"name": "sliding", "size": 6}}
    recipe = {"mixer": window, "layers": [0, 1]}
    model = surgery.convert(tiny.model("llama"), window, [0, 1])
    folder = linearize.save(model, tmp_path / "out", recipe=recipe)
    kept = (folder / "config.json").read_text()
    edited(folder, softmax)
    with pytest.raises(CheckpointError, match=r"mixer: softmax, and linearize\.json .* trained with default"):
        export.load(folder)
    (folder / "config.json").write_text(kept)
    edited(folder, lambda c: c["linearize"]["layers"].update({PLACE.replace("1", "3"): first(c)}))
    with pytest.raises(CheckpointError, match=r"layers\.3\.self_attn\.mixer: default, and .* with softmax"):
        export.load(folder)


def test_without_the_recipe_beside_it_the_model_is_held_alone(folder):
    (folder / "linearize.json").unlink()
    export.load(folder)
    edited(folder, lambda config: first(config).update(mixer="default"))
    export.load(folder)  # nothing there says otherwise
    edited(folder, theta)
    with pytest.raises(CheckpointError, match="rotary embedding turns it by"):
        export.load(folder)


def test_a_plan_written_before_there_were_tables(folder):
    def older(config: Config) -> None:
        del config["linearize"]["turns"]
        for numbers in config["linearize"]["layers"].values():
            del numbers["turns"]

    edited(folder, older)
    export.load(folder)
    edited(folder, theta)
    export.load(folder)  # nothing there says otherwise


@pytest.mark.parametrize("model", ["longrope", "dynamic"])
def test_angles_that_follow_from_a_texts_length_have_no_table(written, model):
    assert "turns" not in json.loads((written / model / "config.json").read_text())["linearize"]


def test_kinds_of_layers_have_a_table_each(written):
    assert len(json.loads((written / "gemma3" / "config.json").read_text())["linearize"]["turns"]) == 2
