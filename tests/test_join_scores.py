"""scripts/join_scores.py: what several processes measured of one model lies in one folder, not to be measured again."""

from __future__ import annotations

from pathlib import Path

import pytest
from judged import judged

from linearize.eval.rows import TEACHER, Scores

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import join_scores

    return lambda *arguments: join_scores.main([str(part) for part in arguments])


def test_rows_and_files_are_added_once(main, tmp_path, capsys):
    whole = judged(tmp_path / "whole")
    rows = Scores(whole / "results.json").rows
    for name, wanted in (("text", True), ("rest", False)):
        (tmp_path / name).mkdir()
        part = [row for row in rows if (row.task == "text") is wanted]
        Scores(tmp_path / name / "results.json").add(part)
        for kind in ("tokens", "samples"):
            for file in (whole / kind).glob("*"):
                if file.name.partition(".")[0] in {row.key for row in part}:
                    (tmp_path / name / kind).mkdir(exist_ok=True)
                    (tmp_path / name / kind / file.name).write_bytes(file.read_bytes())
    target = tmp_path / "new" / "eval"
    assert main(target, tmp_path / "text", tmp_path / "rest") == 0
    joined = Scores(target / "results.json").rows
    assert sorted(joined, key=str) == sorted(rows, key=str)
    assert {file.name for file in (target / "tokens").iterdir()} == {
        file.name for file in (whole / "tokens").iterdir()
    }
    before = (target / "results.json").read_bytes()
    assert main(target, whole) == 0 and "0 measurements" in capsys.readouterr().out
    assert (target / "results.json").read_bytes() == before


def test_the_teachers_alone(main, tmp_path):
    whole = judged(tmp_path / "whole")
    assert main(tmp_path / "next", whole, "--role", TEACHER) == 0
    joined = Scores(tmp_path / "next" / "results.json").rows
    assert joined == [row for row in Scores(whole / "results.json").rows if row.role == TEACHER]
    assert main(tmp_path / "rows.json", whole) == 0
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()].count("tokens") == 0
    assert main(tmp_path / "from-file", tmp_path / "rows.json", "--role", TEACHER) == 0
    alone = [row for row in joined if row.task in ("passkey", "prefill")]
    assert (
        alone and Scores(tmp_path / "from-file" / "results.json").rows == alone
    )  # the others' files are not there
    assert main(tmp_path / "to", tmp_path / "nowhere.json") == 2


def test_a_folder_without_scores_is_named(main, tmp_path, capsys):
    assert main(tmp_path / "to", tmp_path) == 2
    assert "holds no results.json" in capsys.readouterr().err and not (tmp_path / "to").exists()


def test_digits_for_a_repository(main, tmp_path):
    whole = judged(tmp_path / "whole")
    file = tmp_path / "rows.json"
    assert main(file, whole, "--digits", 3) == 0
    rows, joined = Scores(whole / "results.json").rows, Scores(file).rows
    assert len(file.read_text().splitlines()) == len(rows) + 2
    for row, one in zip(rows, joined, strict=True):
        assert one.value == pytest.approx(row.value, rel=5e-3) and (one.key, one.n) == (row.key, row.n)
    assert any(row.value != one.value for row, one in zip(rows, joined, strict=True))
    with pytest.raises(SystemExit):
        main(tmp_path / "folder", whole, "--digits", 3)
