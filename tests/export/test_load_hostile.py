"""`config.linearize` is judged whole: what cannot be right is refused by name, and what was written so far loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import linearize
from linearize import export, surgery
from linearize.errors import CheckpointError, UnsupportedModelError

FIRST = "model.layers.0.self_attn"
Plan = dict[str, Any]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = surgery.convert(tiny.model("llama", num_hidden_layers=2), tiny.LOLCATS)
    return linearize.save(model, tmp_path_factory.mktemp("export") / "out", recipe={"mixer": tiny.LOLCATS})


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(exported, tmp_path / "out"))


def edit(folder: Path, change: Callable[[Plan], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_plan(folder: Path, change: Callable[[Plan], Any]) -> None:
    edit(folder, lambda config: change(config["linearize"]))


def mixer(plan: Plan) -> Plan:
    return plan["mixers"]["default"]


def moved(name: str) -> Callable[[Plan], Any]:
    return lambda plan: plan["layers"].update({name: plan["layers"].pop(FIRST)})


STRUCTURE: dict[str, tuple[Callable[[Plan], Any], str]] = {
    "no mixers": (lambda plan: plan.pop("mixers"), "mixers: must map names to mixers, got null"),
    "mixers list": (lambda plan: plan.update(mixers=[]), r"mixers: must map names to mixers, got \[\]"),
    "mixer list": (
        lambda plan: plan["mixers"].update(default=[]),
        r"mixers\.default: must be a mapping of parts, got \[\]",
    ),
    "part null": (lambda plan: mixer(plan).update(window=None), r"default\.window: null must be a mapping"),
    "nobody's": (
        lambda plan: plan["layers"][FIRST].update(mixer="defalt"),
        rf"{FIRST}\.mixer: there is no mixer 'defalt'; did you mean 'default'",
    ),
    "unnamed": (lambda plan: plan["layers"][FIRST].pop("mixer"), rf"{FIRST}\.mixer: must be the name of a"),
    "named oddly": (
        lambda plan: plan["layers"][FIRST].update(mixer=[]),
        rf"{FIRST}\.mixer: must be the name",
    ),
    "old": (lambda plan: plan.update(format=1), r"mixers\.default: must be a mapping of parts, got null"),
    "part": (
        lambda plan: mixer(plan).update(windw={"name": "full"}),
        r"no such part; did you mean 'window'",
    ),
    "nan": (
        lambda plan: mixer(plan)["window"].update(size=float("nan")),
        r"mixers\.default\.window\.size: nan is no number",
    ),
    "huge": (
        lambda plan: mixer(plan)["window"].update(size=10**30),
        r"mixers\.default\.window\.size: 1000.* is no number",
    ),
    "no layers": (lambda plan: plan.pop("layers"), "layers: must map modules to their numbers, got null"),
    "layers empty": (
        lambda plan: plan.update(layers={}),
        "layers: must map modules .*, got an empty mapping",
    ),
    "layers list": (lambda plan: plan.update(layers=[FIRST]), "layers: must map modules"),
    "layer null": (lambda plan: plan["layers"].update({FIRST: None}), rf"layers\.{FIRST}: must be a mapping"),
    "key": (lambda plan: plan.update(layer={}), "layer: unknown key; did you mean 'layers'"),
    "number": (
        lambda plan: plan["layers"][FIRST].update(head=4),
        "head: unknown number; did you mean 'heads'",
    ),
    "missing": (lambda plan: plan["layers"][FIRST].pop("heads"), rf"{FIRST}\.heads: missing"),
    "nowhere": (moved("model.layers.9.self_attn"), r"no module 'model\.layers\.9\.self_attn' .*did you mean"),
    "embedding": (moved("model.embed_tokens"), "Embedding is not an attention module"),
    "head": (moved("lm_head"), "Linear is not an attention module"),
    "projection": (moved(f"{FIRST}.q_proj"), r"Linear is not an attention module; did you mean"),
    "layer": (moved("model.layers.0"), "LlamaDecoderLayer is not an attention module"),
    "model": (moved(""), "is not an attention module"),
    "forgotten": (lambda plan: plan["layers"].pop(FIRST), rf"holds \d tensors .*{FIRST}\.mixer"),
    "edited": (
        lambda plan: mixer(plan)["window"].update(size=7),
        r"config\.json says mixer\.window\.size: 7, and linearize\.json that it was trained with 6",
    ),
}


@pytest.mark.parametrize("case", STRUCTURE)
def test_a_plan_that_is_not_well_formed(folder, case):
    change, message = STRUCTURE[case]
    edit_plan(folder, change)
    with pytest.raises(CheckpointError, match=message):
        export.load(folder)


NUMBERS = {
    "heads": (0, -1, 2, 10**9, 10**30, "x", None, True, 1.5, float("nan")),
    "kv_heads": (0, -1, 3, 4, 10**9, "x", None),
    "key_dim": (0, -1, 4, 10**9, "x", None),
    "value_dim": (0, -1, 4, 10**9, "x", None),
    "model_dim": (0, -1, 64, 10**9, "x"),
    "scaling": (0, -1, 0.5, float("nan"), float("inf"), "x", None),
    "softcap": (0, -1, 30.0, float("nan"), "x"),
    "sliding_window": (0, -1, 6, 10**30, "x", 1.5),
    "rotary": ("evil", "", 3, None, []),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in NUMBERS.items() for value in values]
)
def test_numbers_that_are_not_the_layers_own(folder, name, value):
    edit_plan(folder, lambda plan: plan["layers"][FIRST].update({name: value}))
    with pytest.raises(CheckpointError, match=rf"{FIRST}\.({name}|turns): |{FIRST}\.mixer.* is asked for"):
        export.load(folder)


@pytest.mark.parametrize("rotary", ["none", "half-once", "pairs", "pairs-complex", "other"])
def test_a_rotation_that_is_not_the_layers_own_where_a_mixer_takes_it_back(tmp_path, rotary):
    model = surgery.convert(tiny.model("llama", num_hidden_layers=2), tiny.LAWCAT)
    folder = linearize.save(model, tmp_path / "out")
    edit_plan(folder, lambda plan: plan["layers"][FIRST].update(rotary=rotary, turns=None))
    with pytest.raises(CheckpointError, match=rf"rotary: is {rotary}, and the layer's own is half"):
        export.load(folder)


def test_a_plan_written_before_the_optional_numbers(folder):
    ids = tiny.tokens()
    expected = export.load(folder)(ids).logits
    for name in ("softcap", "sliding_window", "model_dim", "rotary"):
        edit_plan(folder, lambda plan, name=name: [layer.pop(name) for layer in plan["layers"].values()])
    assert torch.equal(export.load(folder)(ids).logits, expected)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model_type": "linearized_nonsense"}, CheckpointError, "'linearized_nonsense' names no family"),
        ({"model_type": "linearized_lama"}, CheckpointError, "did you mean 'llama'"),
        ({"model_type": "linearized_"}, CheckpointError, "names no family"),
        ({"model_type": "linearized_gpt2"}, CheckpointError, r"config\.linearize: layers\.model"),
        ({"model_type": "evil", "auto_map": {"AutoConfig": "e.C"}}, UnsupportedModelError, "never run"),
        ({"model_type": "llama"}, CheckpointError, "put 'linearized_llama' back"),
        ({"num_hidden_layers": 1}, CheckpointError, r"no module 'model\.layers\.1\.self_attn'"),
        ({"hidden_size": 64, "head_dim": 16}, CheckpointError, "has 4 pairs of dims, and .* turns 8"),
        ({"hidden_size": 64, "head_dim": 8}, CheckpointError, r"tensors do not fit config\.json"),
        ({"num_attention_heads": 0}, CheckpointError, "ZeroDivisionError"),
        ({"linearize": None}, CheckpointError, "format None is neither 1 nor 2"),
    ],
)
def test_a_config_that_does_not_fit(folder, changes, kind, message):
    edit(folder, lambda config: config.update(changes))
    with pytest.raises(kind, match=message) as caught:
        export.load(folder)
    assert "trust_remote_code=True" not in str(caught.value)


def test_weights_that_hold_nan(folder):
    weights = load_file(folder / "model.safetensors")
    weights[f"{FIRST}.q_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"hold NaN .*first: {FIRST}\.q_proj\.weight"):
        export.load(folder)


def test_an_export_on_the_hub_is_looked_at_as_one_on_the_disk(folder, monkeypatch):
    asked = []

    def snapshot_download(**request):
        asked.append((request["repo_id"], request["revision"]))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    ids = tiny.tokens()
    assert torch.equal(export.load("owner/model", revision="v1")(ids).logits, export.load(folder)(ids).logits)
    assert set(asked) == {("owner/model", "v1")}
    edit_plan(folder, lambda plan: plan["layers"][FIRST].update(scaling=0.5))
    with pytest.raises(CheckpointError, match=r"scaling: is 0\.5"):
        export.load("owner/model")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        export.load("no/such/export")


def test_the_folder_chooses_no_kernel(folder):
    edit(
        folder,
        lambda config: config.update(_attn_implementation="evil/kernel", attn_implementation="evil/kernel"),
    )
    assert export.load(folder).config._attn_implementation == "sdpa"


def test_format_1_had_one_mixer_for_all_layers(folder):
    expected = export.load(folder)(tiny.tokens()).logits

    def older(plan: Plan) -> None:
        plan["format"], plan["mixer"] = 1, plan.pop("mixers")["default"]
        for numbers in plan["layers"].values():
            del numbers["mixer"]

    edit_plan(folder, older)
    model = export.load(folder)
    assert torch.equal(model(tiny.tokens()).logits, expected)
    assert model.config.linearize["format"] == 2, "what is saved again is of today's format"
    edit_plan(folder, lambda plan: plan["mixer"]["window"].update(size=7))
    with pytest.raises(CheckpointError, match=r"mixer\.window\.size: 7, and linearize\.json that it was"):
        export.load(folder)
