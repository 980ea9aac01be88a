"""Files as machines and people leave them: marks, line ends, encodings, damage, and names that lead to no file."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from linearize.config.schema import DataConfig
from linearize.data import encoding, load_texts, packed, validation_texts
from linearize.errors import DataError, RecipeError

TEXTS = ["row 0: é one\u2028two", "row 1:\x85next", "row 2: \u2029"]
JSONL = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS)
MARK = b"\xef\xbb\xbf"
COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


def read(source, **options) -> list[str]:
    return [document.text for document in load_texts(str(source), **options)]


@pytest.fixture(params=COMPRESS)
def write(request, tmp_path):
    """Write bytes under a name, compressed in each way that is read."""

    def made(name: str, data: bytes) -> Path:
        path = tmp_path / f"{name}{request.param}"
        path.write_bytes(COMPRESS[request.param](data))
        return path

    return made


@pytest.mark.parametrize("mark", [b"", MARK], ids=["plain", "mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("name", ["text.jsonl", "text.json"])
def test_rows_do_not_depend_on_how_they_are_stored(write, name, end, mark):
    assert read(write(name, mark + JSONL.replace("\n", end).encode())) == TEXTS


@pytest.mark.parametrize("mark", [b"", MARK], ids=["plain", "mark"])
def test_a_text_has_one_form_of_line_ends(write, mark):
    assert read(write("text.txt", mark + "a\r\nb\rc\u2028d\n".encode())) == ["a\nb\nc\u2028d\n"]


def test_an_array_after_a_mark(write):
    assert read(write("text.json", MARK + json.dumps(TEXTS, indent=1).encode())) == TEXTS


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "text.json"])
@pytest.mark.parametrize(
    ("coding", "problem"),
    [
        ("utf-16", "mark of UTF-16.*iconv -f UTF-16 -t UTF-8"),
        ("utf-32", "mark of UTF-32.*iconv -f UTF-32"),
        ("utf-16-le", "NUL bytes.*UTF-16 without a byte order mark"),
        ("utf-16-be", "NUL bytes"),
        ("latin-1", r"byte 0xe9 at or after line 1.*iconv -f WINDOWS-1252"),
    ],
)
def test_other_encodings_are_named_with_the_remedy(write, name, coding, problem):
    text = JSONL.splitlines()[0].replace("\u2028", "") + "\n"
    with pytest.raises(DataError, match=rf"{name}.* cannot be read as UTF-8 text \(.*{problem}"):
        read(write(name, text.encode(coding)))


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "text.json"])
@pytest.mark.parametrize("data", [b"", MARK, b"\n \n"], ids=["nothing", "mark", "blank"])
def test_empty_files_hold_no_text(write, name, data):
    with pytest.raises(DataError, match="there is no text in it"):
        read(write(name, data))


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
def test_a_file_that_was_cut_or_damaged(tmp_path, suffix):
    rng = random.Random(0)
    data = COMPRESS[suffix](bytes(rng.randrange(97, 123) for _ in range(100_000)))
    path = tmp_path / f"text.txt{suffix}"
    for damaged in (data[:-1000], data[:-8], b"damage" + data[6:], b"not packed at all"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cannot be read as UTF-8 text \(.*check the file"):
            read(path)


@pytest.mark.parametrize("pack", [gzip.compress, COMPRESS[".zst"]])
def test_a_packed_file_under_the_name_of_a_plain_one(tmp_path, pack):
    (tmp_path / "text.jsonl").write_bytes(pack(JSONL.encode()))
    with pytest.raises(DataError, match=r"it is (gzip|Zstandard): name it \.(gz|zst)"):
        read(tmp_path / "text.jsonl")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"[" * 100_000, "not JSON .*recursion"),
        (b'{"text": ' + b"1" * 5000 + b"}", "not JSON .*4300"),
        (b'{"text": NaN}', r"must hold text, not float \('nan'\) \(line 2\)"),
        (b'{"text": "\\ud83d"}', r"half of a surrogate pair \('\\ud83d'\).*\(line 2\)"),
        (b'{"text": {"a": "b"}}', r"must hold text, not dict .*\(line 2\)"),
        (b'{"txt": "a"}', r"no column 'text'.*did you mean 'txt'.*\(line 2\)"),
    ],
    ids=["deep", "digits", "nan", "surrogate", "nested", "column"],
)
def test_a_line_that_is_no_row(tmp_path, line, problem):
    path = tmp_path / "text.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=problem):
        read(path)
    path = path.with_suffix(".json")
    path.write_bytes(b"[\n" + line + b"\n]")
    with pytest.raises(DataError):
        read(path)


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "text.json"])
def test_a_text_without_end(tmp_path, monkeypatch, name):
    monkeypatch.setattr(encoding, "LONGEST", 1000)
    path = tmp_path / name
    path.write_text('{"text": "' + "x" * 1000 + '"}\n')
    with pytest.raises(DataError, match="more than 1,000 characters in one text; cut it up"):
        read(path)
    path.write_text('{"text": "x"}\n' * 900)
    if name == "text.txt":
        with pytest.raises(DataError, match="more than 1,000 characters"):
            read(path)
    else:
        assert len(read(path)) == 900


# Parquet


def test_columns_that_are_no_text(tmp_path):
    path = tmp_path / "text.parquet"
    table = {"text": ["a", None, "c"], "n": [1, 2, 3], "deep": [{"text": "x"}] * 3, "bytes": [b"\xff"] * 3}
    pq.write_table(pa.table(table), path, row_group_size=2)
    assert read(path) == ["a", "c"]
    for column, kind in [("n", "int"), ("deep", "dict"), ("bytes", "bytes")]:
        with pytest.raises(DataError, match=rf"column '{column}' must hold text, not {kind} .*\(row 1\)"):
            read(path, text_field=column)
    with pytest.raises(DataError, match=r"no column 'deep\.text'.*did you mean 'text'"):
        read(path, text_field="deep.text")


def test_rows_are_counted_through_all_groups(tmp_path, tokenizer):
    table = pa.table({"prompt": ["q"] * 5, "response": ["a"] * 5, "tools": [None] * 4 + ["[3"]})
    pq.write_table(table, tmp_path / "text.parquet", row_group_size=2)
    with pytest.raises(DataError, match=r"column 'tools' is not JSON .*\(row 5\)"):
        read(tmp_path / "text.parquet", template="chat", tokenizer=tokenizer)


def test_strings_that_are_no_text(tmp_path):
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    pq.write_table(pa.table({"text": broken}), tmp_path / "text.parquet")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read(tmp_path / "text.parquet")


def test_damaged_parquet_is_no_traceback(tmp_path):
    path = tmp_path / "text.parquet"
    pq.write_table(pa.table({"text": [f"row {i} " * 20 for i in range(400)]}), path, row_group_size=100)
    whole = path.read_bytes()
    rng = random.Random(1)
    refused = 0
    for attempt in range(60):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 3, 20])):
            damaged[rng.randrange(len(whole) - 500 if attempt % 2 else 0, len(whole))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read(path)
        except DataError:
            refused += 1
    assert refused > 20


# Names


@pytest.fixture
def inside(tmp_path):
    """A folder with one good file."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_text(JSONL, encoding="utf-8")
    return folder


def test_what_is_no_file_is_named(tmp_path, inside):
    os.mkfifo(inside / "pipe.jsonl")
    (tmp_path / "one.txt").symlink_to(tmp_path / "other.txt")
    (tmp_path / "other.txt").symlink_to(tmp_path / "one.txt")
    (tmp_path / "broken.txt").symlink_to("nowhere")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for source, problem in [
        (inside / "pipe.jsonl", "is a named pipe, not a file"),
        (inside, "is a named pipe"),
        (f"{inside}/*.jsonl", "is a named pipe"),
        ("/dev/zero", "is a device, not a file"),
        (tmp_path / "zero.txt", "is a device"),
        (tmp_path / "one.txt", "cannot be read .*symbolic links"),
        (tmp_path / "broken.txt", "is a link to 'nowhere', which does not exist"),
        ("a\0b", "is no path"),
        ("/" + "x" * 300 + ".txt", "cannot be read .*too long"),
        ("~nobody-of-that-name/a.txt", "write the path out"),
        (inside / "a.jsonl" / "b.jsonl", "does not exist"),
    ]:
        with pytest.raises(DataError, match=problem):
            load_texts(str(source))


def test_a_file_with_a_misspelt_ending_is_no_hub_dataset(inside, monkeypatch):
    monkeypatch.setattr("linearize.data.text._hub_rows", lambda *_: pytest.fail("asked the hub"))
    monkeypatch.chdir(inside)
    with pytest.raises(DataError, match=r"'a\.jsnl' does not exist: .*did you mean 'a\.jsonl'"):
        load_texts("a.jsnl")


def test_all_sources_that_are_wrong_are_named_at_once(inside, monkeypatch):
    monkeypatch.setattr("linearize.data.text._hub_rows", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(RecipeError, match="data source: 3 problems") as caught:
        load_texts([f"{inside}/no-*.txt", str(inside / "a.jsonl"), "~/missing.txt", "/dev/zero", "me/corpus"])
    for problem in ("no file matches", "'~/missing.txt' does not exist", "/dev/zero is a device"):
        assert problem in str(caught.value)


def test_a_folder_with_more_than_files_in_it(inside):
    (inside / "named.jsonl").mkdir()
    (inside / "around").symlink_to(inside)
    (inside / ".hidden").mkdir()
    (inside / ".hidden" / "b.txt").write_text("not text to train on")
    assert read(inside) == TEXTS
    (inside / "part.jsonl").symlink_to("lost.jsonl")
    with pytest.raises(DataError, match=r"part\.jsonl is a link to 'lost\.jsonl', which does not exist"):
        read(inside)


def test_a_folder_with_an_entry_that_may_not_be_read(inside, monkeypatch):
    scan = os.scandir
    (inside / "secret").mkdir()

    def refuse(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"secret cannot be listed \(Permission denied\)"):
        read(inside)


def test_the_root_folder_is_answered_at_once():
    with pytest.raises(DataError):
        load_texts("/proc")


# Options that nothing would follow


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"split": "nope"}, "data.split: the built-in text has no split 'nope': valid: train, validation"),
        ({"split": "tran"}, "did you mean 'train'"),
        ({"template": "chat"}, "data.template: the built-in text is plain text"),
        ({"template": "alpaca"}, "data.template: the built-in text is plain text"),
        ({"text_field": "foo"}, "data.text_field: the built-in text has no column 'foo'"),
    ],
)
def test_options_that_the_sample_does_not_follow(options, problem, tokenizer):
    for source in ("builtin", ["builtin", "builtin"]):
        with pytest.raises(DataError, match=problem):
            load_texts(source, **options)
        with pytest.raises(DataError, match=problem):
            packed(tokenizer, DataConfig(source=source, **options), tokens=10, seed=0)


def test_a_split_of_local_files(inside):
    with pytest.raises(DataError, match=r"data\.split: 'test' is for hub datasets, and .*folder is local"):
        load_texts(str(inside), split="test")


def test_the_sample_beside_rows_of_another_form(inside):
    config = DataConfig(source=["builtin", str(inside)], template="chat", text_field="content")
    assert len(validation_texts(config)) == 18, "template and column are those of the training text"
    assert next(load_texts(["builtin", str(inside)], template="rendered"))


def test_a_template_on_a_txt_file_is_told(tmp_path, caplog):
    (tmp_path / "book.txt").write_text("a")
    assert read(tmp_path / "book.txt", template="alpaca") == ["a"]
    assert "is plain text: data.template and data.text_field do not apply" in caplog.text
    caplog.clear()
    assert validation_texts(DataConfig(validation=str(tmp_path / "book.txt"), template="alpaca")) == ["a"]
    assert len(validation_texts(DataConfig(validation=["builtin"], template="alpaca"))) == 18
    assert not caplog.text


@pytest.mark.parametrize("suffix", COMPRESS)
def test_random_bytes_are_no_traceback(tmp_path, suffix):
    rng = random.Random(2)
    good = MARK + JSONL.encode()
    for attempt in range(150):
        data = bytearray(good)
        for _ in range(rng.choice([1, 2, 8])):
            at = rng.randrange(len(data))
            data[at : at + rng.choice([0, 1, 3])] = rng.choice(
                [b"\0", b"\xff\xfe", b"\r", b'"', b"[{", b"\\u12", b""]
            )
        path = tmp_path / f"text{rng.choice(['.jsonl', '.json', '.txt'])}{suffix}"
        packed_bytes = bytearray(COMPRESS[suffix](bytes(data)))
        if suffix and attempt % 2:
            packed_bytes[rng.randrange(len(packed_bytes))] ^= 1 << rng.randrange(8)
        path.write_bytes(packed_bytes)
        try:
            assert all(isinstance(text, str) and "\ufeff" not in text[:1] for text in read(path))
        except DataError as error:
            assert str(tmp_path) in str(error)
