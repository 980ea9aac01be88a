"""Recipe files that are broken, hostile or no files: refused by name, quickly, and in this package's own words."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from linearize.config import compose
from linearize.config.files import LARGEST, parse
from linearize.errors import RecipeError

FOREIGN = ("hydra", "omegaconf", "full_key", "object_type", "Traceback", "ConfigTypeError", "recursion")
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcde", "bcdef", strict=True)
)


@pytest.fixture
def write(tmp_path):
    """Write a recipe file and give its path."""

    def file(text: str | bytes, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return file


def problems_of(recipe, overrides=()) -> str:
    began = time.process_time()
    with pytest.raises(RecipeError) as caught:
        compose(recipe, overrides)
    text = str(caught.value)
    assert time.process_time() - began < 30
    assert not any(word in text for word in FOREIGN) and len(text) < 3000, text
    return text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BOMB, "aliases that stand for more than"),
        ("a: &a [*a]", "an anchor that contains itself"),
        ("a: &a {b: {c: *a}}", "an anchor that contains itself"),
        ("a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 60)), "nested more than"),
        ("a: " + "[" * 3000, "nested more than"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested more than"),
        ("\n".join(" " * n + f"a{n}:" for n in range(200)), "nested more than"),
        ("a: [" + "1, " * 30_000 + "1]", "more than 20,000 values"),
        (b"a: 1\n" * LARGEST, "larger than"),
        ("layers: all\n---\nlayers: [0]\n", "line 2: a second document"),
        ("stages:\n\ttransfer: 1\n", "a tab where YAML wants spaces"),
        (b"\xff\xfel\x00a\x00", "not UTF-8 text"),
        (b"description: caf\xe9\n", "not UTF-8 text (byte"),
        (b"description: a\x00b\n", "not valid YAML"),
        ("mixer: {a: 1, a: 2}", "mixer.a: stands twice, in lines 1 and 1"),
        ("mixer: !!python/object/apply:os.system [ls]", "mixer: has the tag"),
        ("description: !!binary aGk=", "description: has the tag"),
        ("? [a, b]\n: 3", "a key must be a name"),
        ("<<: 3\nlayers: all", "<< takes a mapping"),
        ("layers: *nobody", "not valid YAML: line 1"),
        ("defaults: [3]", "defaults[0]: must be the name of a recipe, got 3"),
        ("defaults: [{stages: foo}]", "defaults[0]: must be the name of a recipe, got a mapping with stages"),
        ("defaults: {lolcats: null}", "defaults: must be a list"),
        ("defaults: [lolcats, lolcats]", "defaults: names 'lolcats' twice"),
        ("defaults: [../lolcats]", "defaults: unknown recipe '../lolcats'"),
        ("defaults: ['${oc.env:HOME}']", "defaults: unknown recipe"),
        ("defaults: [softmax]\ndescription: '???'", "description: ??? marks a value that is still missing"),
        ("defaults: [softmax]\ndata: {source: '${oc.env:HOME}/x'}", "data.source: ${...} asks for a value"),
        (
            "defaults: [softmax]\ndata: {source: [a, '${data.length}']}",
            "data.source: ${...} asks for a value",
        ),
        ('defaults: [softmax]\ndescription: "a\\u001b[31m"', "holds characters that cannot be printed"),
        ("defaults: [softmax]\nmixer: [window]", "mixer: must be a mapping"),
        ("defaults: [lolcats]\nstages: [transfer]", "stages: must be a mapping"),
        ("defaults: [lolcats]\nstages: null", "stages: must be a mapping of names to values, got null"),
        (
            "defaults: [lolcats]\nstages: {trnasfer: {lr: 1}}",
            "stages.trnasfer: this recipe has no such stage; did you",
        ),
        ("defaults: [lolcats]\nmixer: {window: {name: sliding, size: 0x10}}", "mixer.window.size"),
    ],
)
def test_files_are_refused_by_name(write, text, expected):
    found = problems_of(write(text))
    assert expected in found and "mine.yaml" in found


def test_a_file_and_what_it_starts_from_are_told_together(write):
    """Keys that stand twice with what else is wrong; every recipe that is not there, or broken, with all others."""
    write("defaults: [lolcatz]\nlayers: all", "near.yaml")
    write("mixer: {a: 1", "cut.yaml")
    told = problems_of(write("defaults: [hedgehogg, near, cut, near2]\nlayerz: all"))
    assert "5 problems" not in told and "4 problems" in told, told
    for part in ("recipe 'hedgehogg'; did", "recipe 'lolcatz'; did", "not valid YAML", "recipe 'near2'; did"):
        assert part in told
    write("defaults: [softmax]\nlayers: all\nlayers: [0]", "near.yaml")
    told = problems_of(
        write("defaults: [near]\nlayerz: 1\nrun: {seed: 1, seed: 2, device: tpu}"), ["eval.lengthh=3"]
    )
    parts = ("near.yaml: layers: stands twice", "run.seed: stands twice", "layerz: unknown", "run.device: unknown",
             "eval.lengthh: unknown")  # fmt: skip
    assert "5 problems" in told and all(part in told for part in parts), told


def test_files_that_all_start_from_each_other_end_soon(write):
    names = [f"n{number}" for number in range(15)]
    for name in names:
        write(
            f"defaults: [{', '.join(other for other in names if other != name)}]\nlayers: all", f"{name}.yaml"
        )
    assert "without end" in problems_of(write("defaults: [n0]\nlayers: all"))


def test_recipes_that_start_from_each_other(write):
    write("defaults: [b]\nlayers: all", "a.yaml")
    write("defaults: [a]\nlayers: all", "b.yaml")
    assert "without end: mine -> a -> b -> a" in problems_of(write("defaults: [a]\nlayers: all"))


def test_neighbors_may_be_given_by_their_path(write, tmp_path):
    other = write("defaults: [softmax]\nlayers: [0]", "other.yaml")
    for start in (str(other.absolute()), "./other"):
        assert compose(str(write(f"defaults: [{start}]"))).layers == [0]
    write(f"defaults: [{other.with_name('mine.yaml').absolute()}]", "other.yaml")
    assert "without end: mine -> other -> mine" in problems_of(write(f"defaults: [{other.absolute()}]"))
    elsewhere = tmp_path / "elsewhere" / "other.yaml"
    assert "unknown recipe" in problems_of(write(f"defaults: [{elsewhere}]"))


def test_a_diamond_of_starts_is_read_once(write):
    """Each level starts from two files of the next: 2^18 paths, 37 files."""
    write("defaults: [softmax]\nlayers: [0]", "x0.yaml")
    for level in range(1, 18):
        for side in "xy":
            starts = [f"{s}{level - 1}" for s in "xy" if level > 1 or s == "x"]
            write(f"defaults: [{', '.join(starts)}]\ndescription: {side}{level}", f"{side}{level}.yaml")
    assert compose(write("defaults: [x17, y17]\nrun: {seed: 1}")).layers == [0]


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    for path, expected in {
        tmp_path / "pipe.yaml": "no regular file",
        tmp_path / "loop.yaml": "cannot read",
        tmp_path: "Is a directory",
        "/dev/zero/x.yaml": "cannot read",
        "~nobody-of-that-name/x.yaml": "cannot read",
        f"./{'a' * 300}.yaml": "cannot read",
        "./a\0b.yaml": "cannot read",
        "a\0b": "unknown recipe",
        "a" * 5000: "unknown recipe",
    }.items():
        assert expected in problems_of(path), path


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(write):
    path = write("layers: all")
    path.chmod(0)
    assert "Permission denied" in problems_of(path)


def test_a_byte_order_mark_merge_keys_and_names_that_look_like_values():
    text = "\ufeffa: &a {on: 010, 3: 1e3}\nb: {<<: *a, yes: off, date: 2024-13-45, big: 1:30}\n"
    found = parse(text.removeprefix("\ufeff"), "here")
    assert found["b"] == {"on": 10, "3": "1e3", "yes": False, "date": "2024-13-45", "big": "1:30"}


def test_a_file_with_a_byte_order_mark(write):
    assert compose(write(b"\xef\xbb\xbfdefaults: [softmax]\r\nlayers: [1]\r\n")).layers == [1]


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected"),
    [
        (
            "lolcats",
            ["stages.trnasfer.lr=1"],
            "stages.trnasfer: this recipe has no such stage; did you mean 'transfer'?",
        ),
        (
            "liger_gla",
            ["stages.transfer.tokens=8k"],
            "stages.transfer: this recipe has no such stage; valid: finetune",
        ),
        (
            "lolcats",
            ["stages={}", "calibrate.tokens=0"],
            "stages: empty, but this mixer computes nothing useful",
        ),
        (
            "lolcats",
            ["~stages", "calibrate.tokens=0"],
            "stages: empty, but this mixer computes nothing useful",
        ),
        ("lolcats", ["stages=null"], "stages: must be a mapping"),
        (
            "lolcats",
            ["data.split=nope"],
            "data.split: the builtin text takes no split, so 'nope' would be ignored",
        ),
        ("lolcats", ["data.template=chat"], "data.template: the builtin text takes no template"),
        ("lolcats", ["data.text_field=foo"], "data.text_field: the builtin text takes no text_field"),
        (
            "lolcats",
            ["stages.recover.data.template=alpaca"],
            "stages.recover.data.template: the builtin text takes no",
        ),
        (
            "lolcats",
            ["~stages.recover", "mixer.feature_map.name=none"],
            "stages.transfer.train: the mixer has no para",
        ),
        ("lolcats", ["description=???"], "description: ??? marks a value that is still missing"),
        ("lolcats", ["data.source=${oc.env:HOME}"], "data.source: ${...} asks for a value from elsewhere"),
        (
            "lolcats",
            ["description=${oc.env:SECRET,none}"],
            "description: ${...} asks for a value from elsewhere",
        ),
        ("lolcats", ["stages.*=3"], "'*' stands for every stage"),
        ("lolcats", ["mixer.*.dim=3"], "'*' stands for every stage"),
        ("softmax", ["stages.*.tokens=6k"], "the recipe has no stage that it could stand in"),
        ("lolcats", ["~stages.*.nothing"], "nothing to remove"),
        ("lolcats", [f"layers={'[' * 500}"], "brackets nested more than"),
        ("lolcats", [f"data.source={'x' * 5000}"], "longer than 4,000 characters"),
        ("lolcats", ["layers=[0,"], "cannot read the value '[0,': brackets and quotes must close"),
        (
            "lolcats",
            ["stages.transfer.lr=1,2", "stages.transfer.lr=choice(1,2)"],
            "stages.transfer.lr: must be a number",
        ),
        ("lolcats", ["data.length.x=3"], "data.length.x: cannot be set there: data.length is 1024"),
    ],
)
def test_overrides_are_refused_by_name(recipe, overrides, expected):
    assert expected in problems_of(recipe, overrides)


def test_one_override_for_every_stage():
    recipe = compose("lolcats", ["stages.*.tokens=16k", "stages.*.lora.rank=4", "stages.*.data.length=64"])
    assert {stage.tokens for stage in recipe.stages.values()} == {16_000}
    assert recipe.stages["transfer"].lora is None and recipe.stages["recover"].lora.rank == 4
    assert {recipe.data.of(stage).length for stage in recipe.stages.values()} == {64}
    assert compose("lolcats", ["stages.*.data.length=64", "~stages.*.data"]) == compose("lolcats")


def test_a_stage_is_added_on_purpose():
    recipe = compose(
        "lolcats", ["stages.more.objective=next_token", "stages.more.train=all", "stages.more.tokens=2M"]
    )
    assert list(recipe.stages) == ["transfer", "recover", "more"]


def test_recipes_without_parameters_train_nothing():
    assert compose("swa_sinks").stages == compose("softmax").stages == {}


def test_short_forms_open_up():
    recipe = compose(
        "lolcats",
        [
            "mixer.feature_map=relu",
            "mixer.window=sliding",
            "mixer.window.size=8",
            "layers.every=2",
            "layers.every=3",
        ],
    )
    assert recipe.mixer["window"] == {"name": "sliding", "size": 8} and recipe.layers == {"every": 3}


def test_nothing_of_the_environment_reaches_a_recipe(monkeypatch, write):
    monkeypatch.setenv("A_SECRET", "hunter2")
    assert "hunter2" not in problems_of(write("defaults: [softmax]\ndescription: '${oc.env:A_SECRET}'"))
