"""Tokenized text is kept: the same items, made once, never stale, never in the way."""

from __future__ import annotations

import dataclasses
import errno
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from linearize.config.schema import DataConfig
from linearize.data import hub, packed, packing, store
from linearize.errors import DataError

ROWS = [{"text": f"document {n}: " + "some words " * (3 * n)} for n in range(12)]


@pytest.fixture
def config(jsonl: Any) -> DataConfig:
    return DataConfig(source=jsonl(ROWS), length=16)


def key(tokenizer: Any, config: DataConfig, **changes: Any) -> str | None:
    settings = {"wanted": 160, "seed": 1, "split": "train", **changes}
    return store.key_of(tokenizer, config, config.source, **settings)


def same(one: Any, two: Any) -> bool:
    return len(one) == len(two) and all(
        torch.equal(a[name], b[name]) for a, b in zip(one, two, strict=True) for name in a
    )


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    own, calls = packing._take, []
    monkeypatch.setattr(packing, "_take", lambda *a: calls.append(1) or own(*a))
    return calls


def folders() -> list[Path]:
    return [path for path in (store.cache_dir() / "packed").iterdir() if path.is_dir()]


def test_made_once_and_mapped(tokenizer, config, monkeypatch):
    plain = store.stored(None, lambda: store.Taken(np.arange(3), np.arange(3)))
    assert not isinstance(plain.tokens, np.memmap)
    calls = counted(monkeypatch)
    first, second = (packed(tokenizer, config, tokens=160, seed=1) for _ in range(2))
    assert len(calls) == 1 and same(first, second) and len(first) == 10
    assert isinstance(second._tokens, np.memmap)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "key_of", lambda *_, **__: None)
        assert same(first, packed(tokenizer, config, tokens=160, seed=1))
    read = DataLoader(second, batch_size=3, num_workers=2)
    rows = torch.cat([batch["input_ids"] for batch in read])
    assert torch.equal(rows, torch.stack([item["input_ids"] for item in first]))
    packed(tokenizer, config, tokens=160, seed=2)
    assert len(folders()) == 2


def test_the_key_holds_all_that_decides_the_text(tokenizer, config, jsonl, tmp_path):
    keys = [key(tokenizer, config)]
    keys += [key(tokenizer, config, **change) for change in ({"wanted": 176}, {"seed": 2}, {"split": "x"})]
    for change in ({"length": 32}, {"boundaries": False}, {"template": "rendered"}, {"text_field": "x"}):
        keys.append(key(tokenizer, dataclasses.replace(config, **change)))
    keys.append(key(tokenizer, DataConfig(source=[config.source, "builtin"], length=16)))
    keys.append(key(tokenizer, DataConfig(source=jsonl([*ROWS, ROWS[0]], "b.jsonl"), length=16)))
    own = key(tokenizer, config)
    tokenizer(["a", "bcd"], padding=True)  # leaves its padding in the tokenizer
    assert key(tokenizer, config) == own == keys[0]
    elsewhere = DataConfig(source=jsonl(ROWS, "c.jsonl"), length=16)
    assert key(tokenizer, elsewhere) == own, "where a file lies does not decide"
    tokenizer.chat_template += " "
    keys.append(key(tokenizer, config))
    tokenizer.add_tokens(["word"])
    keys.append(key(tokenizer, config))
    Path(config.source).write_text('{"text": "other"}\n' * 30)
    keys.append(key(tokenizer, config))
    assert None not in keys and len(set(keys)) == len(keys)


def test_what_cannot_be_told_has_no_key(tokenizer, monkeypatch):
    stream = DataConfig(source="owner/name", length=16)
    for revision, known in ((None, False), ("abc", True)):
        monkeypatch.setattr(hub, "revision", lambda name, revision=revision: revision)
        assert (key(tokenizer, stream) is not None) == known
    assert key(object(), DataConfig()) is None, "a slow tokenizer"


def test_without_a_network_a_dataset_has_no_revision(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.revision("owner/name:config") is None


@pytest.mark.parametrize("damage", ["cut", "bit", "missing", "about"])
def test_a_damaged_one_is_made_again(tokenizer, config, damage, monkeypatch, caplog):
    calls = counted(monkeypatch)
    first = [dict(item) for item in packed(tokenizer, config, tokens=160, seed=1)]
    (folder,) = folders()
    path = folder / "tokens.npy"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "bit":
        content = bytearray(path.read_bytes())
        content[-9] ^= 1
        path.write_bytes(content)
    elif damage == "missing":
        path.unlink()
    else:
        (folder / store.ABOUT).write_text("{")
    again = packed(tokenizer, config, tokens=160, seed=1)
    assert len(calls) == 2 and same(first, list(again)) and "is damaged; it is replaced" in caplog.text
    assert same(first, list(packed(tokenizer, config, tokens=160, seed=1))) and len(calls) == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_is_told_and_nothing_is_lost(tokenizer, config, number, monkeypatch, caplog):
    def full(*_: Any) -> None:
        raise OSError(number, "No space left on device" if number == errno.ENOSPC else "Permission denied")

    calls = counted(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(store.np, "save", full)
        found = packed(tokenizer, config, tokens=160, seed=1)
    assert len(calls) == 1 and len(found) == 10 and folders() == []
    assert "the tokenized text is not kept: cannot write its cache" in caplog.text
    assert "set LINEARIZE_CACHE" in caplog.text
    assert same(found, packed(tokenizer, config, tokens=160, seed=1))


def test_what_the_text_itself_does_wrong_is_said_once(tokenizer, jsonl, monkeypatch):
    bad = jsonl([{"text": "good " * 9}, {"text": 3}])
    with pytest.raises(DataError):
        packed(tokenizer, DataConfig(source=bad, length=16), tokens=1 << 20, seed=1)
    calls = []

    def broken() -> store.Taken:
        calls.append(1)
        raise OSError(errno.EIO, "the disk of the text")

    with pytest.raises(OSError, match="the disk of the text"):
        store.stored("k", broken)
    assert len(calls) == 1 and folders() == []


def test_two_at_once_make_it_once():
    calls, found = [], []

    def take() -> store.Taken:
        calls.append(1)
        time.sleep(0.5)
        return store.Taken(np.arange(8, dtype=np.int32), np.zeros(8, np.uint8), 3)

    threads = [threading.Thread(target=lambda: found.append(store.stored("k", take))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and [taken.dropped for taken in found] == [3, 3]
    assert all(np.array_equal(taken.tokens, np.arange(8)) for taken in found)
