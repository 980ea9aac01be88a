"""Files are for whom the umask says, whoever writes them; and a disk that is full is told in one way."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import tiny
import torch
from byte_llama import byte_tokenizer
from safetensors import SafetensorError
from transformers import LlamaConfig, PreTrainedModel

import linearize
from linearize import modes, storing, surgery
from linearize.decode import prefix_file
from linearize.errors import CheckpointError
from linearize.export import streamed
from linearize.export.save import save
from linearize.models import cache

RUST = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
FULL = [OSError(errno.ENOSPC, "No space left on device"), RUST]


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def wrong(folder: Path, umask: int) -> dict[str, str]:
    found = {}
    for path in (folder, *folder.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode != (0o777 if path.is_dir() else 0o666) & ~umask:
            found[path.name] = oct(mode)
    return found


def converted():
    return surgery.convert(tiny.model("llama", num_hidden_layers=2), tiny.LOLCATS, "all")


def test_exports(tmp_path, umask):
    (tmp_path / "in").mkdir()
    for size in ("5GB", "20KB"):
        linearize.save(converted(), tmp_path / "in" / size, tokenizer=byte_tokenizer(), max_shard_size=size)
    assert not wrong(tmp_path / "in", umask)
    assert modes.umask() == umask


def test_whatever_holds_tensors(tmp_path, umask):
    folder = tmp_path / "in"
    folder.mkdir()
    tensors = {"a": torch.zeros(2)}
    storing.write_tensors_file(folder / "a.safetensors", tensors)
    storing.write_folder(folder / "b", lambda to: storing.write_tensors(to / "c.safetensors", tensors))
    streamed.write(folder, tensors.__getitem__, tensors, writes=True)
    cache._build(folder / "d", lambda to: LlamaConfig().save_pretrained(to))
    assert not wrong(folder, umask)


def test_without_a_system_that_tells(monkeypatch, umask):
    monkeypatch.setattr(Path, "read_text", lambda *args, **kwargs: "")
    assert modes.umask() == umask
    assert modes.umask() == umask, "asking changed it"


@pytest.mark.parametrize("error", FULL, ids=["os", "rust"])
def test_a_full_disk_has_one_wording(tmp_path, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(storing, "save_file", full)
    said = []
    with pytest.raises(CheckpointError) as caught:
        storing.write_tensors_file(tmp_path / "state", {}, again=storing.ONCE_MORE)
    said.append(str(caught.value))
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(CheckpointError) as caught:
        save(tiny.model("llama", num_hidden_layers=1), tmp_path / "out")
    said.append(str(caught.value))
    assert said == [
        f"{tmp_path / 'state'}: the disk is full: free space, then give the command again",
        f"{tmp_path / 'out'}: the disk is full. What was there before is untouched: free space, then give the command "
        "again",
    ]
    (tmp_path / "recipe.yaml").touch()  # a run's folder
    with pytest.raises(CheckpointError, match=r"give the command again, a run with --resume$"):
        save(tiny.model("llama", num_hidden_layers=1), tmp_path / "out")


def test_a_state_speaks_of_no_run(tmp_path, monkeypatch):
    from linearize.decode.prefix import read_ids

    prefix = read_ids(converted().eval(), torch.tensor([[3, 4, 5]]))
    monkeypatch.setattr(storing, "save_file", lambda *args: (_ for _ in ()).throw(FULL[0]))
    with pytest.raises(CheckpointError, match=r"the disk is full: free space, then give the command again$"):
        prefix_file.save_state(prefix, tmp_path / "state")


def test_the_reason_is_the_systems(tmp_path):
    other = SafetensorError("Error while serializing: I/O error: File too large (os error 27)")
    said = str(storing.could_not_write(tmp_path / "a", other, again=storing.ONCE_MORE))
    assert said.endswith(
        "a: could not be written (File too large): mend the cause, then give the command again"
    )
