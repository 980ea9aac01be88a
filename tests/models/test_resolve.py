"""The MODEL argument in every form, and what is said about one that is wrong."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from linearize.errors import CheckpointError, ModelNotFoundError
from linearize.models import cache_dir, load_config, resolve


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("LINEARIZE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "linearize"


def test_a_folder_is_taken_as_it_is(checkpoint, cache):
    assert resolve(str(checkpoint)) == checkpoint
    assert not cache.exists()


@pytest.mark.parametrize("name", ["smollm2-135", "smollm2", "SmolLM2-135M", "smolm2-135m"])
def test_a_misspelt_alias_gets_the_right_one_offered(name):
    with pytest.raises(ModelNotFoundError, match=f"no model '{name}': did you mean 'smollm2-135m'"):
        resolve(name)


def test_a_misspelt_path_gets_its_neighbor_offered(checkpoint):
    with pytest.raises(ModelNotFoundError, match=re.escape(f"did you mean '{checkpoint}'")):
        resolve(str(checkpoint)[:-1])
    with pytest.raises(ModelNotFoundError, match=r"no such file or folder; .*does not exist either"):
        resolve(str(checkpoint / "no" / "where"))


@pytest.mark.parametrize("name", ["", "two words", "model.gguf", "./model", "a/b/c"])
def test_what_can_be_no_hub_id_is_refused_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda **_: pytest.fail("asked the hub"))
    with pytest.raises(ModelNotFoundError, match="no such file or folder"):
        resolve(name)


def test_a_folder_that_is_no_checkpoint_says_what_it_looks_like(tmp_path, gguf):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(
        ModelNotFoundError, match=r"no config\.json; give a folder that save_pretrained wrote"
    ):
        resolve(str(folder))
    gguf.rename(folder / "tiny.gguf")
    with pytest.raises(ModelNotFoundError, match=r"give the GGUF file inside it: .*tiny\.gguf"):
        resolve(str(folder))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match="only a peft adapter"):
        resolve(str(folder))


def test_a_run_folder_leads_to_its_checkpoint(checkpoint, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    checkpoint.rename(run / "checkpoint")
    with pytest.raises(ModelNotFoundError, match=r"give the checkpoint inside it: .*run/checkpoint"):
        resolve(str(run))


def test_a_file_that_is_not_gguf_is_refused(checkpoint):
    with pytest.raises(
        ModelNotFoundError, match="not a GGUF file; give the folder that holds the checkpoint: "
    ):
        resolve(str(checkpoint / "config.json"))


def test_a_resolved_model_takes_milliseconds_and_no_torch(gguf, checkpoint):
    import subprocess

    resolve(str(gguf))
    code = (
        "import sys, timeit; from time import process_time; from linearize.models import resolve\n"
        "seconds = timeit.repeat(lambda: [resolve(name) for name in sys.argv[1:]], process_time, number=1, repeat=5)\n"
        "print(min(seconds), 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(gguf), str(checkpoint)], capture_output=True, text=True, check=True
    )
    seconds, *heavy = done.stdout.split()
    assert heavy == ["False", "False"]
    assert float(seconds) < 0.1


# The hub, without one: snapshot_download is what asks it.


class Hub:
    """Stands for the hub: what is cached here, what a download brings, and what was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.local: Path | None = None
        self.remote: Path | Exception | None = None
        self.downloads: list[dict] = []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self)

    def __call__(self, **request) -> str:
        if request.get("local_files_only"):
            if self.local is None:
                raise LocalEntryNotFoundError("not cached")
            return str(self.local)
        self.downloads.append(request)
        if isinstance(self.remote, Exception):
            raise self.remote
        return str(self.remote)


@pytest.fixture
def hub(monkeypatch) -> Hub:
    return Hub(monkeypatch)


def test_a_hub_model_is_fetched_without_pickles_and_code(hub, checkpoint):
    hub.remote = checkpoint
    assert resolve("owner/model@v1") == checkpoint
    (request,) = hub.downloads
    assert (request["repo_id"], request["revision"]) == ("owner/model", "v1")
    allowed = request["allow_patterns"]
    assert "*.safetensors" in allowed
    assert not any(pattern.endswith((".bin", ".pt", ".pth", ".py", "*")) for pattern in allowed)


def test_among_runs_and_models_a_missing_folder_is_no_hub_id(hub, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"runs/none'.*; runs holds no run; .*write runs/none@main"):
        resolve("runs/none")
    for name in ("first", "other"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        (tmp_path / "mine" / name / "recipe.yaml").write_text("")
    with pytest.raises(
        ModelNotFoundError, match=r"no such file or folder; mine holds first, other; for a model"
    ):
        resolve("mine/wanted")
    assert hub.downloads == []
    hub.remote = checkpoint
    assert resolve("mine/wanted@main") == checkpoint and len(hub.downloads) == 1
    (tmp_path / "owner").mkdir()  # of a project, say
    assert resolve("owner/model") == checkpoint
    hub.local = checkpoint  # what is here is meant
    assert resolve("mine/wanted") == checkpoint


def test_a_complete_hub_model_is_used_without_asking_again(hub, checkpoint):
    (checkpoint / "tokenizer.json").write_text("{}")
    hub.local = checkpoint
    assert resolve("owner/model") == checkpoint
    assert hub.downloads == []


def test_a_partial_hub_download_is_taken_up_again(hub, checkpoint):
    hub.local = hub.remote = checkpoint
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"hub model 'owner/model': .*is missing"):
        resolve("owner/model")
    shard.write_bytes(content)
    assert resolve("owner/model") == checkpoint
    assert len(hub.downloads) == 2


def test_offline_a_model_without_a_tokenizer_is_still_found(hub, checkpoint):
    hub.local, hub.remote = checkpoint, LocalEntryNotFoundError("no network")
    assert resolve("owner/model") == checkpoint


def test_offline_says_so(hub):
    hub.remote = LocalEntryNotFoundError("no network\nand more")
    with pytest.raises(
        ModelNotFoundError, match=r"cannot reach .* for 'owner/model' \(no network\); connect"
    ):
        resolve("owner/model")


def test_a_hub_config_needs_no_weights(hub, checkpoint):
    for shard in checkpoint.glob("*.safetensors*"):
        shard.unlink()
    hub.remote = checkpoint
    assert load_config("owner/model").model_type == "llama"
    assert hub.downloads[0]["allow_patterns"] == ["config.json"]


def test_the_hash_of_a_changed_file_is_not_remembered(gguf):
    first = resolve(str(gguf))
    content = bytearray(gguf.read_bytes())
    content[-1] ^= 1
    time.sleep(0.01)
    gguf.write_bytes(content)
    assert resolve(str(gguf)) != first


def test_a_config_without_model_type_is_refused(checkpoint):
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    del config["model_type"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="names no model_type"):
        resolve(str(checkpoint))
