"""The remote-code export loads in a process that has never seen this package, and matches bit for bit."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import linearize
from linearize import surgery
from linearize.export.bundle import _needs_triton, _renamed, bundle

SCRIPT = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
for work in sys.argv[1:]:
    folder = work + "/out"
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        loud = False
    except ValueError:
        loud = True
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = load_file(work + "/ids.safetensors")["ids"]
    with torch.no_grad():
        out = {"logits": model(ids).logits, "generated": model.generate(ids, max_new_tokens=8, do_sample=False)}
    model.save_pretrained(work + "/again")
    again = AutoModelForCausalLM.from_pretrained(work + "/again", trust_remote_code=True)
    with torch.no_grad():
        out["again"] = again(ids).logits
    save_file(out, work + "/found.safetensors")
    print(json.dumps({"loud": loud, "package": "linearize" in sys.modules, "class": type(model).__name__}))
"""


FAMILIES = ("llama", "gemma3", "gpt2", "mixtral")
TAYLOR = {**tiny.LOLCATS, "feature_map": {"name": "taylor", "dim": 8}}
"""On a GPU its recurrent branch takes another way than its feature map says."""


@pytest.mark.parametrize(
    "names", [("gemma3", "taylor"), pytest.param(FAMILIES, marks=pytest.mark.slow)], ids="-".join
)
def test_loads_without_the_package(names, tmp_path):
    """Kinds of families, and of mixers, in one process that knows torch and transformers alone."""
    models = {}
    for name in names:
        mixer = TAYLOR if name == "taylor" else tiny.LOLCATS
        model = surgery.convert(tiny.model("llama" if name == "taylor" else name), mixer, [0, 2])
        tiny.randomize(layer.mixer for layer in surgery.converted(model))
        linearize.save(model, tmp_path / name / "out")
        save_file({"ids": tiny.tokens()}, tmp_path / name / "ids.safetensors")
        models[name] = model
    result = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, *(str(tmp_path / name) for name in models)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    said = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert said == [
        {"loud": True, "package": False, "class": type(model).__name__} for model in models.values()
    ]
    for name, model in models.items():
        out = load_file(tmp_path / name / "found.safetensors")
        ids = tiny.tokens()
        with torch.no_grad():
            assert torch.equal(out["logits"], model(ids).logits), name
        assert torch.equal(out["again"], out["logits"]), name
        assert torch.equal(out["generated"], model.generate(ids, max_new_tokens=8, do_sample=False)), name


def test_saving_a_loaded_export_drops_the_auto_map(tmp_path):
    """Otherwise config.json would name a file that is not copied along."""
    folder = linearize.save(surgery.convert(tiny.model(), tiny.LOLCATS), tmp_path / "out")
    assert "auto_map" in json.loads((folder / "config.json").read_text())
    linearize.load(folder).save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_bundle_is_plain_python_without_internal_imports():
    source = bundle(surgery.convert(tiny.model(), tiny.LOLCATS))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] in {
                "__future__",
                "collections",
                "contextlib",
                "dataclasses",
                "functools",
                "torch",
                "transformers",
                "types",
                "typing",
            }
    assert (
        "triton_" not in source
        and "custom_op" not in source
        and "def short_conv_streams" in bundle(surgery.convert(tiny.model(), tiny.LAWCAT))
    ), "operators come along in their torch form alone"
    assert "class Hedgehog" in source and "class Performer" not in source, "only the parts in use come along"


def test_private_names_of_two_modules_stay_apart():
    """`_part` of the second module; its attribute and the text of the same name stay."""
    text = "def _part(x):\n    return x._part + _part('_part')\n\nüber = [_part for _ in _part]"
    assert _renamed(text, "_part", "_part_b") == (
        "def _part_b(x):\n    return x._part + _part_b('_part')\n\nüber = [_part_b for _ in _part_b]"
    )


def test_branches_to_triton_are_recognized():
    found = [
        _needs_triton(ast.parse(text, mode="eval").body)
        for text in (
            "dispatch.use_triton(q)",
            "not a and dispatch.use_triton(q, k)",
            "not dispatch.use_triton(q)",
            "a",
        )
    ]
    assert found == [True, True, False, False]
