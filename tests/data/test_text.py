"""Sources: every form that data.source takes, the order they are read in, and what is said about a wrong one."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from linearize.config.schema import DataConfig
from linearize.data import hub, load_texts, text, validation_texts
from linearize.errors import DataError

TEXTS = ["first\n\nwith a paragraph", "second", "third"]
ROWS = [{"text": value} for value in TEXTS]


def read(source, **options) -> list[str]:
    return [document.text for document in load_texts(source, **options)]


def test_parquet(parquet):
    source = parquet({"text": TEXTS, "source": ["a", "b", "c"]}, row_group_size=2)
    assert read(source) == TEXTS


def test_jsonl(jsonl):
    assert read(jsonl(ROWS)) == TEXTS


@pytest.mark.parametrize("content", [ROWS, TEXTS, {"version": 1, "data": ROWS}])
def test_json(tmp_path, content):
    path = tmp_path / "text.json"
    path.write_text(json.dumps(content, indent=1))
    assert read(str(path)) == TEXTS


def test_jsonl_by_the_name_of_json(jsonl):
    assert read(jsonl(ROWS, "text.json")) == TEXTS


def test_a_txt_file_is_one_document(tmp_path):
    (tmp_path / "book.txt").write_text("one\n\ntwo\n")
    assert read(str(tmp_path / "book.txt"), template="alpaca") == ["one\n\ntwo\n"]


def test_compressed(tmp_path):
    with gzip.open(tmp_path / "text.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    assert read(str(tmp_path / "text.jsonl.gz")) == TEXTS


def test_a_folder_is_read_in_order_with_its_subfolders(jsonl, tmp_path):
    (tmp_path / "b").mkdir()
    for index, name in enumerate(["a.jsonl", "b/c.jsonl", "d.jsonl"]):
        jsonl([ROWS[index]], name)
    (tmp_path / "README.md").write_text("not text to train on")
    assert read(str(tmp_path)) == TEXTS


def test_a_glob(jsonl, tmp_path):
    jsonl([ROWS[0]], "train-1.jsonl")
    jsonl([ROWS[1]], "train-2.jsonl")
    jsonl([ROWS[2]], "test.jsonl")
    assert read(str(tmp_path / "train-*.jsonl")) == TEXTS[:2]


def test_a_list_mixes_kinds(jsonl, parquet, tmp_path):
    (tmp_path / "x.txt").write_text("third")
    sources = [jsonl(ROWS[:1]), parquet({"text": ["second"]}), str(tmp_path / "x.txt")]
    assert read(sources) == TEXTS


def test_empty_rows_are_passed_over(parquet):
    assert read(parquet({"text": ["", "one", None, "  \n"]})) == ["one"]


def test_a_seed_shuffles_over_all_files(jsonl):
    sources = [jsonl([{"text": f"{name}{i}"} for i in range(30)], f"{name}.jsonl") for name in "ab"]
    first = read(sources, seed=1)
    assert first == read(sources, seed=1)
    assert first != read(sources, seed=2)
    assert Counter(first) == Counter(read(sources))
    assert 5 < sum(name.startswith("a") for name in first[:30]) < 25


def test_large_text_is_shuffled_pool_by_pool(jsonl, monkeypatch):
    monkeypatch.setattr(text, "POOL", 100)
    texts = [f"{i:010d}" for i in range(50)]
    found = read(jsonl([{"text": value} for value in texts]), seed=0)
    assert sorted(found) == texts and found != texts
    assert sorted(found[:10]) == texts[:10]


def test_the_sample(monkeypatch):
    train, validation = read("builtin"), read("builtin", split="validation")
    assert sum(map(len, train)) > 8_000_000
    assert 200_000 < sum(map(len, validation)) < 400_000
    held = {value[i : i + 200] for value in validation for i in range(0, len(value) - 200, 200)}
    joined = "\n".join(train)
    assert not any(piece in joined for piece in sorted(held)[:300])
    files = list(text.builtin.FOLDER.iterdir())
    assert sum(path.stat().st_size for path in files) < 3_000_000


def test_validation_texts_default_to_the_sample():
    texts = validation_texts(DataConfig(source="nowhere.jsonl", text_field="content", template="chat"))
    assert len(texts) == 18


def test_validation_texts_of_a_file(jsonl):
    assert validation_texts(DataConfig(validation=jsonl(ROWS))) == TEXTS


# Mistakes


def test_a_missing_column_gets_the_nearest_offered(parquet, jsonl):
    for source in (parquet({"texts": TEXTS, "id": [1, 2, 3]}), jsonl([{"texts": "a", "id": 1}])):
        with pytest.raises(
            DataError, match=r"has no column 'text'.*did you mean 'texts'\? \(columns: texts, id\)"
        ):
            load_texts(source)
        assert read(source, text_field="texts")


def test_a_column_of_another_type(parquet):
    with pytest.raises(DataError, match=r"text\.parquet: column 'text' must hold text, not int"):
        read(parquet({"text": [1, 2]}))


@pytest.mark.parametrize("name", ["text.parquet", "text.json", "text.jsonl", "text.txt"])
def test_an_unreadable_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff\xfe{")
    with pytest.raises(DataError, match=rf"{name} cannot be read as .*; check the file"):
        read(str(tmp_path / name))


def test_a_column_that_is_there_twice(tmp_path):
    path = tmp_path / "text.parquet"
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array([1]), pa.array([2])]
    pq.write_table(pa.Table.from_arrays(columns, names=["text", "text", "id", "id"]), path)
    with pytest.raises(DataError, match=r"text\.parquet has 2 columns 'text', and which of them"):
        load_texts(str(path))
    pq.write_table(pa.Table.from_arrays(columns[1:], names=["text", "id", "id"]), path)
    assert read(str(path)) == ["b"], "columns that nobody reads may be as they like"


def test_a_truncated_parquet_file(parquet, tmp_path):
    path = tmp_path / "text.parquet"
    parquet({"text": TEXTS * 100})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match="cannot be read as parquet"):
        load_texts(str(path))


@pytest.mark.parametrize(
    ("line", "problem"), [("{", "not JSON"), ("[1]", "must be an object"), ('"a"', "not str")]
)
def test_a_bad_line_is_named(jsonl, tmp_path, line, problem):
    path = tmp_path / "text.jsonl"
    jsonl(ROWS)
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(DataError, match=rf"text\.jsonl, line 5: .*{problem}"):
        read(str(path))


@pytest.mark.parametrize("rows", [[], [{"text": ""}, {"text": None}]])
def test_empty_data(jsonl, rows):
    with pytest.raises(DataError, match="there is no text in it"):
        read(jsonl(rows))


def test_names_that_lead_nowhere(tmp_path, jsonl):
    jsonl(ROWS)
    with pytest.raises(DataError, match=re.escape(f"did you mean '{tmp_path}/text.jsonl'")):
        load_texts(str(tmp_path / "txet.jsonl"))
    with pytest.raises(DataError, match="did you mean 'builtin'"):
        load_texts("bultin")
    with pytest.raises(DataError, match="no file matches"):
        load_texts(str(tmp_path / "*.parquet"))
    with pytest.raises(DataError, match="holds no parquet, JSONL, JSON, txt or md file"):
        (tmp_path / "empty").mkdir()
        load_texts(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="files of this kind are not read"):
        (tmp_path / "table.csv").write_text("a,b")
        load_texts(str(tmp_path / "table.csv"))
    for nothing in ([], "", [""], None, 3):
        with pytest.raises(DataError, match="must be a name or a list of names"):
            load_texts(nothing)


def test_a_folder_of_several_kinds(tmp_path, jsonl, parquet):
    jsonl(ROWS)
    parquet({"text": TEXTS})
    with pytest.raises(DataError, match=r"several kinds \(jsonl, parquet\).*give a glob such as"):
        load_texts(str(tmp_path))


def test_notes_are_text_where_nothing_else_is(tmp_path, caplog):
    for number in range(2):
        (tmp_path / f"{number}.md").write_text(f"# note {number}")
    assert {document.text for document in load_texts(str(tmp_path))} == {"# note 0", "# note 1"}
    (tmp_path / "book.txt").write_text("a book")
    (tmp_path / "page.pdf").write_text("%PDF")
    with caplog.at_level("INFO"):
        assert [document.text for document in load_texts(str(tmp_path))] == ["a book"]
        load_texts(str(tmp_path))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == f"folder {tmp_path}: left out 3 files (.md, .pdf); '{tmp_path}/**/*.md' reads those"
    assert len(list(load_texts(f"{tmp_path}/**/*.md"))) == 2
    assert [document.text for document in load_texts(str(tmp_path / "1.md"))] == ["# note 1"]


@pytest.mark.parametrize(
    "row, template, meant",
    [
        ({"messages": []}, "none", "chat"),
        ({"conversations": []}, "none", "chat data.text_field=conversations"),
        ({"prompt": "a", "response": "b"}, "none", "chat"),
        ({"instruction": "a", "input": "", "output": "b"}, "none", "alpaca"),
        ({"instruction": "a", "output": "b"}, "chat", "alpaca"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "alpaca", "preference"),
    ],
)
def test_columns_that_another_template_reads(jsonl, row, template, meant):
    tokenizer = SimpleNamespace(chat_template="{{ messages }}")
    with pytest.raises(DataError, match=rf"such columns are for data\.template={meant}$"):
        load_texts(jsonl([row]), template=template, tokenizer=tokenizer)


def test_pairs_that_an_objective_reads_have_one_template(jsonl):
    with pytest.raises(DataError, match="no column 'prompt'") as caught:
        load_texts(jsonl([{"instruction": "a", "output": "b"}]), template="preference")
    assert "such columns" not in str(caught.value)


def test_rows_without_an_answer(jsonl):
    with pytest.raises(DataError, match="only such as hold no output"):
        list(load_texts(jsonl([{"instruction": "a", "output": " "}]), template="alpaca"))


@pytest.mark.parametrize(
    ("template", "row", "empty", "wants"),
    [
        ("alpaca", {"instruction": "a", "output": "b"}, {"output": " "}, "output"),
        ("chat", {"prompt": "a", "response": "b"}, {"response": ""}, "answer of the assistant"),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}, {"chosen": " "}, "pair of answers"),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}, {"rejected": None}, "pair of answers"),
        ("none", {"text": "a"}, {"text": ""}, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("seed", [None, 1])
def test_rows_without_an_answer_are_counted(jsonl, tokenizer, caplog, template, row, empty, wants, seed):
    """Empty lines of plain text are usual, and nothing is said of them."""
    source = jsonl([{**row, **empty}, row, row, {**row, **empty}])
    assert len(list(load_texts(source, template=template, tokenizer=tokenizer, seed=seed))) == 2
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == (
        [] if wants is None else
        [f"{source}: rows that hold no {wants} are passed over, 2 of them; mend them or take them out"]
    )  # fmt: skip
    caplog.clear()
    next(iter(load_texts(source, template=template, tokenizer=tokenizer)))  # a reader that has enough
    assert caplog.text.count("passed over, 1 of them") == (wants is not None)


def test_an_unknown_template(jsonl):
    with pytest.raises(DataError, match="unknown template 'alpacca': did you mean 'alpaca'"):
        load_texts(jsonl(ROWS), template="alpacca")


# The hub, without one


@pytest.fixture
def opened(monkeypatch) -> list[tuple]:
    """What load_dataset was asked for; it has a train split of ten rows."""
    asked: list[tuple] = []

    def load_dataset(repo, config, *, split, streaming):
        asked.append((repo, config, split, streaming))
        if split not in ("train", "test"):
            raise ValueError(f"Bad split: {split}. Available splits: ['train', 'test']")
        rows = [{"text": f"{split} {i}"} for i in range(10)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_hub_dataset_is_streamed(opened):
    assert read("owner/name:config") == [f"train {i}" for i in range(10)]
    assert opened == [("owner/name", "config", "train", True)]


def test_a_hub_dataset_is_shuffled_by_the_seed(opened):
    first = read("owner/name", seed=1)
    assert first == read("owner/name", seed=1) and sorted(first) == read("owner/name") != first


def test_a_hub_dataset_and_a_file_take_turns(opened, jsonl):
    assert read(["owner/name", jsonl(ROWS)])[:6] == [
        "first\n\nwith a paragraph",
        "train 0",
        "second",
        "train 1",
        "third",
        "train 2",
    ]


def test_validation_of_the_hub_falls_back_on_test(opened):
    assert validation_texts(DataConfig(validation="owner/name"))[0] == "test 0"


def test_a_wrong_split(opened):
    with pytest.raises(DataError, match=r"split 'tran', cannot be opened \(Bad split: tran\. Available"):
        load_texts("owner/name", split="tran")


def test_a_hub_dataset_without_the_column(opened):
    with pytest.raises(DataError, match="hub dataset 'owner/name' has no column 'content'"):
        load_texts("owner/name", text_field="content")


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist"),
            "neither a file or folder here nor",
        ),
        (ConnectionError("no network"), "the Hugging Face hub cannot be reached"),
    ],
)
def test_a_hub_dataset_that_cannot_be_had(monkeypatch, error, problem):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=problem):
        load_texts("owner/name")


def test_a_dataset_with_a_damaged_file():
    def stream():
        yield {"text": "one"}
        raise ValueError("no such column")

    rows = hub.rows(stream(), "owner/name")
    assert next(rows) == ("row 1", {"text": "one"})
    with pytest.raises(DataError, match=r"'owner/name' cannot be read on \(no such column\)"):
        next(rows)


def test_a_download_that_breaks_off():
    def stream():
        yield {"text": "one"}
        raise ConnectionError("reset")

    rows = hub.rows(stream(), "owner/name")
    next(rows)
    with pytest.raises(DataError, match="'owner/name': the download broke off"):
        next(rows)
