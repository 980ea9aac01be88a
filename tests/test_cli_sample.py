"""`linearize sample`: the file, the table, and what is said of what cannot be."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
from byte_llama import byte_tokenizer, tiny_llama

from linearize.cli import main
from linearize.sample import store
from linearize.sample.writer import Writer

SMALL = ["--batch", "4", "--device", "cpu"]
QUICK = ["--tokens", "400", "--length", "96", *SMALL]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "cache_dir", lambda: tmp_path / "cache")
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_parquet_and_jsonl_hold_the_same(folder, capsys):
    assert main(["sample", "model", *QUICK]) == 0
    said = capsys.readouterr().out
    for words in ("kept", "dropped, loops", "tokens/s on cpu", "runs/model-text.parquet"):
        assert words in said
    rows = pq.read_table(folder / "runs" / "model-text.parquet").to_pylist()
    assert sum(row["tokens"] for row in rows) >= 400 and set(rows[0]) == {"text", "source", "tokens"}
    assert main(["sample", "model", *QUICK, "--out", "text.jsonl"]) == 0
    assert "all of it was in the cache" in capsys.readouterr().out
    lines = (folder / "text.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines if line] == rows


def test_ctrl_c_says_that_the_command_goes_on(folder, capsys, monkeypatch):
    original, calls = Writer.write, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Writer, "write", interrupted)
    command = ["sample", "model", *SMALL, "--length", "96", "--tokens", "1500"]
    assert main(command) == 130
    assert (
        f"what was written is kept, and the same command goes on: linearize {' '.join(command)}"
        in " ".join(capsys.readouterr().err.split())
    )
    assert main(command) == 0
    assert "tokens of this text are there already" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--out", "text.txt"], "must end with .parquet or .jsonl"),
        (["--top-p", "0"], "must be a number above 0"),
        (["--chat", "2"], "must be auto, or a number from 0 to 1"),
        (["--chat", "0.5"], "--chat=0.5: this model's tokenizer has no chat template"),
        (["--temprature", "1"], "did you mean '--temperature'"),
        (["--tokens", "500"], "argument --tokens: given twice (400 and 500); it takes one value"),
    ],
)
def test_refused(folder, capsys, arguments, words):
    assert main(["sample", "model", *QUICK, *arguments]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--length", "8", "--tokens", "400"], "--length: must be at least 64"),
        (["--length", "96", "--tokens", "0"], "there is nothing to write"),
        (["--length", "1000", "--tokens", "400"], "--length=1000: the model has 512 positions"),
    ],
)
def test_numbers_out_of_range(folder, capsys, arguments, words):
    assert main(["sample", "model", *SMALL, *arguments]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_no_file_is_written_over(folder, capsys):
    (folder / "text.jsonl").write_text("mine")
    assert main(["sample", "model", *QUICK, "--out", "text.jsonl"]) == 2
    assert "text.jsonl exists" in capsys.readouterr().err and (folder / "text.jsonl").read_text() == "mine"


@pytest.mark.parametrize("place", ["file/text.jsonl", "/proc/text.jsonl", "/proc/no/such/text.parquet"])
def test_a_folder_that_cannot_be_written(folder, capsys, place):
    (folder / "file").write_text("")
    assert main(["sample", "model", *QUICK, "--out", place]) == 2
    assert "cannot be written" in (said := " ".join(capsys.readouterr().err.split()))
    assert "choose another file with --out" in said
    assert not (folder / "cache").exists(), "told before anything was written"


def test_a_disk_that_is_full_at_the_end(folder, capsys, monkeypatch):
    (folder / ".partial-text.parquet").mkdir()  # stands in the way of the file
    assert main(["sample", "model", *QUICK, "--out", "text.parquet"]) == 2
    assert "what was sampled is in the cache" in " ".join(capsys.readouterr().err.split())
    (folder / ".partial-text.parquet").rmdir()
    assert main(["sample", "model", *QUICK, "--out", "text.parquet"]) == 0
    assert "all of it was in the cache" in capsys.readouterr().out
