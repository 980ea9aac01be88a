"""Released files of MMLU and HellaSwag become tasks that lm-eval knows, item for item; what is damaged is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "results"))
import offline_tasks


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """One subject as first released (no header, letters), another with a header and numbers."""
    for split, count in (("dev", 5), ("test", 3)):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        letters = "".join(f'"Which, ""of"" these {n}?",one,two,three,"f, our",D\n' for n in range(count))
        (tmp_path / "mmlu" / split / f"anatomy_{split}.csv").write_text(letters)
        numbers = "question,choice0,choice1,choice2,choice3,answer\n" + "Why?,a,b,c,d,2\n" * count
        (tmp_path / "mmlu" / split / f"virology_{split}.csv").write_text(numbers)
    return tmp_path


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_both_become_tasks_that_lm_eval_knows(released, tmp_path, capsys):
    from linearize.eval import lm_tasks

    six = ["Roofing: A man sits. he", "3", "wraps.", "rips.", "holds.", "starts pulling: so."]
    (tmp_path / "six.txt").write_text("\n".join(six * 2) + "\n")
    out = tmp_path / "tasks"
    given = [str(out), "--mmlu", str(tmp_path / "mmlu"), "--hellaswag", str(tmp_path / "six.txt")]
    assert offline_tasks.main(given) == 0
    said = capsys.readouterr().out
    assert "mmlu_files: 6 items, sha256 " in said and "hellaswag_files: 2 items, sha256 " in said
    asked = {"question": 'Which, "of" these 0?', "choices": ["one", "two", "three", "f, our"], "answer": 3}
    assert lines(out / "data" / "anatomy.test.jsonl")[0] == asked
    assert [x["answer"] for x in lines(out / "data" / "virology.dev.jsonl")] == [2] * 5
    story = lines(out / "data" / "hellaswag.validation.jsonl")[1]
    assert story == {
        "activity_label": "Roofing",
        "ctx_a": "A man sits. he",
        "ctx_b": "",
        "endings": six[2:],
        "label": "3",
    }
    suite = lm_tasks.suite(["mmlu_files", "hellaswag_files"], shots=None, limit=0, include=out, data=None)
    assert len(suite.units) == 2 and {"mmlu_files_anatomy", "mmlu_files_virology"} <= lm_tasks.known(out)


def test_json_lines_of_hellaswag_stay_as_they_are(tmp_path):
    item = {"ctx_a": "A lady walks.", "ctx_b": "the lady", "endings": ["a", "b", "c", "d"], "label": 1}
    (tmp_path / "val.jsonl").write_text(json.dumps(item) + "\n")
    assert list(offline_tasks.stories(tmp_path / "val.jsonl")) == [item]


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("mmlu/test/anatomy_test.csv", "Why?,a,b,c,d,E\n", "item 1 is not a question"),
        ("mmlu/test/anatomy_test.csv", "Why?,a,b,c\n", "item 1 is not a question"),
        ("mmlu/test/alchemy_test.csv", "Why?,a,b,c,d,A\n", "no subject 'alchemy'"),
        ("six.txt", "one\ntwo\n", "six lines an item"),
        ("six.txt", "no colon\n1\na\nb\nc\nd\n", "line 1 is no context"),
        ("six.txt", "A: b\n7\na\nb\nc\nd\n", "line 1 is no context"),
    ],
)
def test_what_is_damaged_is_named(released, tmp_path, file, text, words):
    (tmp_path / file).write_text(text)
    option = "--mmlu" if file.startswith("mmlu") else "--hellaswag"
    place = tmp_path / ("mmlu" if option == "--mmlu" else file)
    with pytest.raises(SystemExit, match=words):
        offline_tasks.main([str(tmp_path / "tasks"), option, str(place)])


def test_without_a_source_or_with_a_wrong_one(tmp_path, capsys):
    for given in ([str(tmp_path)], [str(tmp_path), "--mmlu", str(tmp_path / "none")]):
        with pytest.raises(SystemExit):
            offline_tasks.main(given)
    assert "is not there" in capsys.readouterr().err
