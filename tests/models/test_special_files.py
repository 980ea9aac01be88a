"""What a checkpoint's folder holds instead of files, and names in it that lead out of it: refused by name, at once."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import tiny
from byte_llama import byte_tokenizer

import linearize
from linearize import surgery
from linearize.cli import main
from linearize.errors import CheckpointError
from linearize.models import load_teacher, load_tokenizer

READ = (
    "config.json", "generation_config.json", "linearize.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "additional_chat_templates/a.jinja", "model.safetensors.index.json", "README.md",
)  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    model = surgery.convert(tiny.model("llama", num_hidden_layers=2), tiny.LOLCATS, "all")
    recipe = {"mixer": tiny.LOLCATS}
    return linearize.save(
        model, tmp_path_factory.mktemp("special") / "one", tokenizer=byte_tokenizer(), recipe=recipe
    )


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    """A copy of it, by links."""
    made = tmp_path / "one"
    made.mkdir()
    for path in exported.iterdir():
        (made / path.name).symlink_to(path)
    return made


def put(path: Path, kind: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a folder":
        path.mkdir()
    else:
        here = Path.cwd()
        os.chdir(path.parent)  # addresses of sockets are short
        try:
            socket.socket(socket.AF_UNIX).bind(path.name)
        finally:
            os.chdir(here)


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a socket"])
@pytest.mark.parametrize("name", READ)
def test_nothing_is_waited_for(folder, name, kind):
    put(folder / name, kind)
    with pytest.raises(
        CheckpointError, match=rf"{Path(name).name} is {kind} and not a file|holds no tokenizer"
    ):
        linearize.load(folder)
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "linearize.json", "model.safetensors"]
)
def test_a_folder_of_the_name(folder, name):
    put(folder / name, "a folder")
    with pytest.raises(CheckpointError, match=rf"{name} is a folder and not a file"):
        linearize.load(folder)


@pytest.mark.parametrize(
    "command", [["generate", "--prompt", "a"], ["push", "me/one", "--dry-run"], ["inspect", "lolcats"]]
)
def test_the_commands_say_so(folder, command, capsys):
    name = "generation_config.json" if command[0] != "inspect" else "config.json"
    put(folder / name, "a pipe")
    assert main([command[0], str(folder), *command[1:]]) == 2
    said = capsys.readouterr().err
    assert f"{name} is a pipe and not a file" in " ".join(said.split()) and "Traceback" not in said


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ({"recipe": [1]}, r"recipe is \[1\], and a mapping is asked for"),
        ({"recipe": "lolcats"}, "recipe is 'lolcats'"),
        ({"recipe": {"mixer": [1]}}, r"recipe.mixer is \[1\]"),
        ({"recipe": {"mixer": {}, "mixers": 3}}, "recipe.mixers is 3"),
        ([1], "holds a list, not a mapping"),
    ],
)
def test_a_note_that_turns_the_check_off_is_refused(folder, note, message):
    path = folder / "linearize.json"
    path.unlink()
    path.write_text(json.dumps(note))
    with pytest.raises(CheckpointError, match=message):
        linearize.load(folder)


@pytest.mark.parametrize("note", [None, {}, {"recipe": {}}, {"recipe": None}])
def test_a_note_that_says_nothing_of_a_recipe_passes(folder, note):
    (folder / "linearize.json").unlink()
    if note is not None:
        (folder / "linearize.json").write_text(json.dumps(note))
    linearize.load(folder)


def named(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer_config.json"
    held = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps({**held, **changes}))


@pytest.mark.parametrize(
    "outside",
    [
        "../../other/tokenizer.4.0.0.json",
        "{}/tokenizer.4.0.0.json",
        "C:\\a\\tokenizer.4.0.0.json",
        "..\\tokenizer.4.0.0.json",
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_a_tokenizer_is_read_from_its_folder_alone(folder, tmp_path, outside, there):
    other = tmp_path / "other"
    other.mkdir()
    name = outside.format(other)
    if there:
        (other / "tokenizer.4.0.0.json").symlink_to((folder / "tokenizer.json").resolve())
    named(folder, fast_tokenizer_files=["tokenizer.json", name])
    for loader in (load_tokenizer, lambda path: load_teacher(str(path))):
        with pytest.raises(
            CheckpointError, match=r"fast_tokenizer_files names .* outside the checkpoint's folder"
        ):
            loader(folder)


def test_versions_of_a_tokenizer(folder):
    named(folder, fast_tokenizer_files=["tokenizer.json", "tokenizer.4.0.0.json", "tokenizer.99.0.0.json"])
    with pytest.raises(
        CheckpointError, match=r"takes 'tokenizer.4.0.0.json', which the folder does not have"
    ):
        load_tokenizer(folder)
    (folder / "tokenizer.4.0.0.json").symlink_to((folder / "tokenizer.json").resolve())
    load_tokenizer(folder)  # one that a later transformers would take may be missing
    for value in ("tokenizer.json", [3], {"a": 1}):
        named(folder, fast_tokenizer_files=value)
        with pytest.raises(CheckpointError, match="fast_tokenizer_files must be a list of file names"):
            load_tokenizer(folder)


@pytest.mark.parametrize("key", ["vocab_file", "merges_file", "tokenizer_file", "some_new_file"])
def test_whatever_key_names_a_file_outside(folder, tmp_path, key):
    """A path that leads nowhere stands in many published checkpoints, left from where they were made."""
    other = tmp_path / "other.json"
    named(folder, **{key: str(other)})
    load_tokenizer(folder)
    other.write_text("{}")
    for name in (str(other), "../other.json"):
        named(folder, **{key: name})
        with pytest.raises(CheckpointError, match=rf"{key} is .*, a file outside the checkpoint's folder"):
            load_tokenizer(folder)
    named(folder, **{key: "tokenizer.json"})
    load_tokenizer(folder)
