"""`linearize bench`: a folder that cannot be written, or holds something else, is told, without a traceback."""

from __future__ import annotations

import pytest

from linearize.cli import main

COMMANDS = {
    "recipes": [
        "recipes",
        "--shape",
        "tiny",
        "--recipes",
        "lolcats",
        "--batch",
        "2",
        "--length",
        "32",
        "--only",
    ],
    "train": ["train", "--shapes", "tiny", "--recipes", "lolcats", "--only"],
    "decode": [
        "decode",
        "random",
        "--shape",
        "tiny",
        "--recipes",
        "lolcats",
        "--context",
        "8",
        "--prefill",
        ",",
    ],
}
commands = pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)


@commands
@pytest.mark.parametrize("below", ["", "in/it"])
def test_a_file_stands_in_the_way(command, below, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["bench", *command, "--device", "cpu", "--out", str(tmp_path / "file" / below)]) == 2
    assert "could not be written" in capsys.readouterr().err


@commands
@pytest.mark.parametrize("content", ["{", '{"rows": []}', '[{"recipe": "lolcats"}]'])
def test_other_rows_stand_there(command, content, tmp_path, capsys):
    name = "train.json" if command[0] == "train" else "recipes.json"
    (tmp_path / name).write_text(content)
    assert main(["bench", *command, "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert f"{name}: not rows of this benchmark" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == content
