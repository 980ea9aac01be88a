"""scripts/align_layers.py: layers of a tiny model aligned alone, by the shipped plan; rows are not made again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from byte_llama import TEXT, byte_tokenizer, tiny_llama

ROOT = Path(__file__).resolve().parents[1]
PLAN = ROOT / "scripts" / "align_layers.yaml"


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import align_layers

    return align_layers.main


def test_the_error_falls_and_rows_stay(main, tmp_path, capsys):
    teacher, text, out = tmp_path / "teacher", tmp_path / "text.txt", tmp_path / "layers.json"
    tiny_llama().save_pretrained(teacher)
    byte_tokenizer().save_pretrained(teacher)
    text.write_text(TEXT)
    sizes = ["--length", "32", "--sequences", "16", "--steps", "20", "--layers", "1"]
    files = ["--model", str(teacher), "--out", str(out), f"data.source={text}", "mixer.window.size=4"]
    given = [str(PLAN), *sizes, *files, "--only", "weights,LoLCATs' mixer"]
    assert main(given) == 0
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["weights, 1", "LoLCATs' mixer, 1"]
    for row in rows.values():
        assert 0 < row["aligned"] < row["window"]
    assert "| weights | 0.001 |" in capsys.readouterr().out
    assert main(given) == 0
    assert json.loads(out.read_text())["rows"] == rows


def test_longer_texts_are_looked_at_by_position(main, tmp_path, capsys):
    teacher, text, out = tmp_path / "teacher", tmp_path / "text.txt", tmp_path / "layers.json"
    tiny_llama().save_pretrained(teacher)
    byte_tokenizer().save_pretrained(teacher)
    text.write_text(TEXT)
    sizes = ["--length", "32", "--sequences", "16", "--steps", "2", "--layers", "1", "--far", "100"]
    files = [f"data.source={text}", f"data.validation={text}", "mixer.window.size=4", "--only", "weights"]
    assert main([str(PLAN), "--model", str(teacher), "--out", str(out), *sizes, *files]) == 0
    far = json.loads(out.read_text())["rows"]["weights, 1"]["far"]
    assert list(far) == ["0-32", "32-64", "64-100"]
    assert all(0 < error["aligned"] != error["window"] > 0 for error in far.values())
    assert "left at 64-100, %" in capsys.readouterr().out


def test_mistakes_are_told(main, tmp_path, capsys):
    assert main([str(PLAN), "--only", "weight"]) == 2
    assert "did you mean 'weights'?" in capsys.readouterr().err
    for text, said in (
        ("[]", "names no variants"),
        ("variants: {a: {rate: 1}}", "no recipe"),
        ("{", "plan.yaml"),
        ("{recipe: lolcats, variants: {a: []}}", "variant 'a'"),
    ):
        (tmp_path / "plan.yaml").write_text(text)
        assert main([str(tmp_path / "plan.yaml")]) == 2
        assert said in capsys.readouterr().err
