"""Parts of sampled text: what is not what was written is not taken, whichever bit of it has turned."""

from __future__ import annotations

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from linearize.sample import store
from linearize.sample.store import Counts, Part, Store

TEXTS = [
    f"document {number}: " + "the river rose and the miller moved his corn. " * 3 for number in range(60)
]


@pytest.fixture
def kept(monkeypatch, tmp_path):
    monkeypatch.setattr(store, "cache_dir", lambda: tmp_path)
    made = Store("key")
    made.folder.mkdir(parents=True)
    counts = Counts()
    for _ in TEXTS:
        counts.add(None, 40, ended=True)
    made.write(0, Part(TEXTS, ["opening"] * 60, [40] * 60, list(range(60)), counts))
    return made


def test_what_was_written_is_read(kept):
    counts, beginnings = kept.read(0)
    assert counts.tokens["kept"] == 2400 and beginnings == list(range(60)) and kept.read(1) is None


def test_no_bit_turns_unseen(kept, caplog):
    path, dice = kept.part(0), random.Random(0)
    good, whole = path.read_bytes(), kept.read(0)
    for _ in range(60):
        bad = bytearray(good)
        bad[dice.randrange(len(bad))] ^= 1 << dice.randrange(8)
        path.write_bytes(bad)
        found = kept.read(0)
        assert found is None or (found == whole and pq.read_table(path)["text"].to_pylist() == TEXTS)
    path.write_bytes(good[:-50])
    assert kept.read(0) is None and "is damaged: it is sampled again" in caplog.text


@pytest.mark.parametrize(
    "counts",
    ["", "5", "[]", "{}", '{"documents": 5, "tokens": {}}', '{"documents": {}, "tokens": {}, "ended": 0}',
     json.dumps({"documents": dict.fromkeys(("kept", *store.REASONS), -1), "tokens": {}, "ended": 0}), "[" * 5000],
)  # fmt: skip
def test_counts_that_are_none(kept, counts):
    path = kept.part(0)
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({store._META: counts.encode()}), path)
    assert kept.read(0) is None


def test_a_part_of_before_there_were_digests_is_taken(kept):
    path = kept.part(0)
    table = pq.read_table(path)
    meta = {name: value for name, value in table.schema.metadata.items() if name != store._DIGEST}
    pq.write_table(table.replace_schema_metadata(meta), path)
    assert kept.read(0) is not None
    pq.write_table(pa.table({"text": ["a"]}).replace_schema_metadata(meta), path)
    assert kept.read(0) is None
