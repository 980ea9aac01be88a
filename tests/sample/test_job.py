"""The whole job on a tiny model: kept in parts, gone on with, the same whatever interrupts it."""

from __future__ import annotations

import threading
from itertools import pairwise

import pyarrow.parquet as pq
import pytest
import tiny
import torch
from byte_llama import byte_tokenizer, tiny_llama

from linearize import models, surgery
from linearize.config.schema import TeacherConfig
from linearize.distill.identity import fingerprint
from linearize.errors import CheckpointError, DataError, UnsupportedModelError
from linearize.sample import job, sample, store
from linearize.sample.writer import Writer

SETTINGS = TeacherConfig(length=96, batch=4, temperature=1.0, top_k=50)
ROUND = 4 * 96


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture
def write(model):
    def make(tokens: int, settings: TeacherConfig = SETTINGS, **options):
        given = {"teacher": {"weights": "a"}, "tokenizer": byte_tokenizer(), "load": lambda: model, **options}
        return sample(tokens, settings, **given)

    return make


def rows(found) -> list[dict]:
    return [row for path in found.files for row in pq.read_table(path).to_pylist()]


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """A fresh cache, by number."""
    return lambda number: monkeypatch.setattr(store, "cache_dir", lambda: tmp_path / f"cache{number}")


def test_text_is_there_and_counted(write):
    found = write(600)
    texts = rows(found)
    kept = found.counts
    assert 600 <= kept.tokens["kept"] == sum(row["tokens"] for row in texts)
    assert kept.documents["kept"] == len(texts) == len({row["text"] for row in texts})
    assert sum(kept.tokens.values()) == len(found.files) * ROUND
    assert found.made in (len(found.files) * ROUND, (len(found.files) + 1) * ROUND), (
        "one round on a guess at most"
    )
    assert all(row["source"].startswith("teacher/") and row["source"] != "teacher/chat" for row in texts)
    assert not any("<eos>" in row["text"] or "<bos>" in row["text"] for row in texts)


def test_what_is_there_is_not_written_again(write):
    first = write(600)

    def load():
        raise AssertionError("the model is not needed")

    again = write(600, load=load)
    assert again.files == first.files and again.made == 0 and again.counts == first.counts
    fewer = write(100, load=load)
    assert fewer.files == first.files[:1], "as many of the first parts as that takes"


def test_more_goes_on_and_is_the_same_as_at_once(write, elsewhere):
    elsewhere(1)
    write(200)
    grown = rows(write(1200))
    elsewhere(2)
    assert rows(write(1200)) == grown
    elsewhere(3)
    assert rows(write(1200, TeacherConfig(**{**vars(SETTINGS), "seed": 1}))) != grown


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_interrupted_anywhere_it_is_the_same(write, elsewhere, monkeypatch, stop):
    elsewhere(1)
    whole = rows(write(1500))
    elsewhere(2)
    original, calls = Writer.run, []

    def run(self, steps):
        calls.append(steps)
        if len(calls) in (3, 8):  # within a round each
            raise stop
        original(self, steps)

    monkeypatch.setattr(Writer, "run", run)
    for _ in range(2):
        with pytest.raises(stop):
            write(1500)
    assert rows(write(1500)) == whole
    assert not list(store.cache_dir().rglob("*.partial"))


def test_ctrl_c_loses_no_finished_round(write, monkeypatch):
    original, calls = Writer.write, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Writer, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(1500)
    assert len(list(store.cache_dir().rglob("part-*.parquet"))) == 1


def test_a_damaged_part_is_written_again(write):
    found = write(1000)
    before = rows(found)
    found.files[0].write_bytes(b"PAR1")
    assert rows(write(1000)) == before


def test_a_batch_that_a_folder_began_with_stays(write, monkeypatch):
    """What fits may change with the machine; a text that goes on does not."""
    from linearize.sample import job

    settings = TeacherConfig(**{**vars(SETTINGS), "batch": "auto"})
    monkeypatch.setattr(job, "ROWS_ON_CPU", 2)
    write(50, settings)
    monkeypatch.setattr(job, "ROWS_ON_CPU", 5)
    found = write(400, settings)
    assert sum(found.counts.tokens.values()) == len(found.files) * 2 * 96


def test_two_at_once_write_it_once(write):
    made = []
    threads = [threading.Thread(target=lambda: made.append(write(600))) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert made[0].files == made[1].files and sorted(found.made > 0 for found in made) == [False, True]


def test_what_cannot_be_had(write, model, monkeypatch, tmp_path):
    with pytest.raises(DataError, match="no chat template; set it to 0 or auto"):
        write(100, TeacherConfig(chat=0.5))
    with pytest.raises(DataError, match="the model has 512 positions; take 512 or less"):
        write(100, TeacherConfig(length=513))
    turning = tiny_llama()
    turning.config.rope_parameters = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 1e4}
    turning.config.max_position_embeddings = 64
    with pytest.raises(DataError, match="length=96: the model has 64 positions"):
        write(100, load=lambda: turning)
    turning.config.rope_parameters |= {"rope_type": "longrope", "original_max_position_embeddings": 32}
    with pytest.raises(DataError, match=r"length=48: .* otherwise beyond 32"):
        write(100, TeacherConfig(length=48), load=lambda: turning)
    converted = surgery.convert(tiny_llama(), tiny.LOLCATS, "all")
    with pytest.raises(UnsupportedModelError, match="is a conversion; text is sampled from its teacher"):
        write(100, load=lambda: converted)
    with pytest.raises(UnsupportedModelError, match="chunked_attention"):
        llama4 = tiny_llama()
        llama4.config.attention_chunk_size = 8
        write(100, load=lambda: llama4)
    looping = TeacherConfig(length=200, batch=2, temperature=0.0)
    parrot = tiny_llama()
    with torch.no_grad():
        parrot.lm_head.weight.zero_()  # the first token of the vocabulary, for ever
    with pytest.raises(DataError, match=r"next to no text that can be kept.*loop"):
        write(100, looping, load=lambda: parrot)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(store, "cache_dir", lambda: tmp_path / "file")
    with pytest.raises(CheckpointError, match="set LINEARIZE_CACHE to a folder on another disk"):
        write(100)


def test_the_real_teacher():
    """A few hundred tokens of it: words, and answers in its chat template."""
    name = "smollm2-135m"
    found = sample(
        300,
        TeacherConfig(length=96, batch=6, chat=0.5),
        teacher=fingerprint(name),
        tokenizer=models.load_tokenizer(models.resolve(name)),
        load=lambda: models.load_teacher(name)[0],
    )
    texts = rows(found)
    turns = [row["text"] for row in texts if row["source"] == "teacher/chat"]
    assert turns and all("<|im_start|>user\n" in text and "<|im_start|>assistant\n" in text for text in turns)
    plain = " ".join(row["text"] for row in texts if row["source"] != "teacher/chat")
    assert plain and "<|im_start|>" not in plain
    letters = sum(character.isalpha() or character.isspace() for character in plain)
    assert letters > 0.6 * len(plain)


def test_the_bar_goes_on_without_a_jump_and_ends_at_its_end(write, monkeypatch):
    seen: list[tuple[int, int]] = []

    class Watched(job.Meter):
        def advance(self, n, **numbers):
            super().advance(n, **numbers)
            seen.append((self.done, self.total))

    monkeypatch.setattr(job, "Meter", Watched)
    monkeypatch.setattr(job, "LIKELY", 0.05)  # far from what is kept
    found = write(1500)
    done = [0, *(done for done, _ in seen)]
    assert len(found.files) > 3 and done[-1] == seen[-1][1] == 1500
    steps = [after - before for before, after in pairwise(done)]
    assert min(steps) >= 0 and max(steps[:-1]) <= ROUND, "what was guessed wrong is spread over a round"
