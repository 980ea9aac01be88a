"""A text read once by the command and by the package: what is printed, what follows, and what is refused."""

from __future__ import annotations

import json
import shlex

import byte_llama
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import linearize
from linearize import cli, export, surgery
from linearize.decode.identity import checksum
from linearize.errors import LinearizeError

TEXT, MORE = byte_llama.TEXT[:150], " In the year 17"
NEW = ["--max-new-tokens", "12"]


def student(seed: int = 0):
    torch.manual_seed(1)
    return surgery.convert(byte_llama.tiny_llama(seed=seed), byte_llama.MIXER, "all")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "student"
    return export.save(student(), folder, tokenizer=byte_llama.byte_tokenizer())


@pytest.fixture(scope="module")
def doc(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "doc.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def state(checkpoint, doc, tmp_path, capsys):
    path = tmp_path / "doc.state"
    line = ["generate", str(checkpoint), "--prompt-file", str(doc), "--save-state", str(path)]
    assert cli.main(line) == 0
    said = capsys.readouterr().out
    assert (
        f"{path}: 150 tokens read; 0.0 MiB at any length" in said
        and f"--state {shlex.quote(str(path))} --prompt" in said
    )
    return path


def test_the_command_goes_on_as_from_the_whole_text(checkpoint, state, capsys):
    assert cli.main(["generate", str(checkpoint), "--prompt", TEXT + MORE, *NEW]) == 0
    whole = capsys.readouterr().out
    for _ in range(2):
        assert cli.main(["generate", str(checkpoint), "--state", str(state), "--prompt", MORE, *NEW]) == 0
        assert TEXT + capsys.readouterr().out == whole


def test_a_state_is_read_on_and_kept(checkpoint, doc, state, tmp_path, capsys):
    further = tmp_path / "further.state"
    line = [
        "generate",
        str(checkpoint),
        "--state",
        str(state),
        "--prompt",
        MORE,
        "--save-state",
        str(further),
    ]
    assert cli.main(line) == 0
    assert f"{further}: 165 tokens read" in capsys.readouterr().out
    ids = byte_llama.byte_tokenizer()(TEXT + MORE)["input_ids"]
    assert linearize.load_state(further).begins(ids) and not linearize.load_state(state).begins(ids[1:])


def test_text_level(checkpoint, tmp_path):
    model, tokenizer = linearize.load(checkpoint), byte_llama.byte_tokenizer()
    kept = linearize.save_state(linearize.read_state(model, tokenizer, TEXT), tmp_path / "a.state")
    state = linearize.load_state(kept, model, tokenizer)
    for options in ({}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}):

        def made(prompt, state=None, options=options):
            torch.manual_seed(5)
            return linearize.generate(model, tokenizer, prompt, state=state, max_new_tokens=12, **options)

        assert made([MORE, MORE], state) == made([TEXT + MORE, TEXT + MORE])
    pieces: list[str] = []
    streamed = linearize.generate(
        model, tokenizer, MORE, state=state, max_new_tokens=12, on_text=pieces.append
    )
    assert "".join(pieces) == streamed[0]
    for prompts, options, said in [
        (["a", "bc"], {}, "prompts of unequal length behind a state"),
        (MORE, {"chat": True}, "a chat template behind a state"),
        (MORE, {"num_beams": 2}, "behind a state there is greedy decoding and sampling"),
        (MORE, {"repetition_penalty": 1.3}, "behind a state there is greedy decoding and sampling"),
        ("", {}, "an empty prompt"),
    ]:
        with pytest.raises(LinearizeError, match=said):
            linearize.generate(model, tokenizer, prompts, state=state, **options)
    with pytest.raises(LinearizeError, match="an empty prompt"):
        linearize.read_state(model, tokenizer, "")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--chat", "--prompt", "a"], "--chat with --state: a template closes the message"),
        (["--num-beams", "2", "--prompt", "a"], "--num-beams with --state"),
        (["--save-state", "x.state", "--temperature", "1", "--prompt", "a"], "--temperature with --save-state"),
        *[
            (["--save-state", "x.state", "--prompt", "a", *option.split()], f"{option.split()[0]} with --save-state")
            for option in (
                "--max-new-tokens 128", "--seed 0", "--top-p 0.5", "--temperature 0", "--no-graph", "--compile"
            )
        ],
        (["--save-state", "x.state", "--prompt", "a", "--no-graph", "--seed", "3", "--max-new-tokens", "4"],
         "--max-new-tokens, --seed, --no-graph with --save-state"),
        (["--seed", "0", "--prompt", "a"], "--seed 0: nothing is sampled at temperature 0"),
        (["--save-state", "no/x.state", "--prompt", "a"], "there is no folder no"),
        (["--prompt-file", "no.txt"], "--prompt-file no.txt cannot be read (No such file or directory)"),
        (["--prompt-file", "."], "--prompt-file . is a folder; give a text file"),
        (["--prompt-file", "latin.txt"], "--prompt-file latin.txt is no text in UTF-8 (byte 1)"),
        (["--prompt-file", "no.txt", "--prompt", "a"], "not allowed with argument"),
        (["--prompt", ""], "an empty prompt: give at least one character"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing(checkpoint, state, tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"l\xe0\xff")
    before = sorted(tmp_path.iterdir())
    assert cli.main(["generate", str(checkpoint), "--state", str(state), *options]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and shown.out == ""
    assert sorted(tmp_path.iterdir()) == before


def test_another_model_and_a_forged_file_are_told_before_anything_is_printed(
    checkpoint, state, tmp_path, capsys
):
    other = export.save(student(seed=3), tmp_path / "other", tokenizer=byte_llama.byte_tokenizer())
    capsys.readouterr()
    line = ["generate", str(other), "--state", str(state), "--prompt", MORE]
    assert cli.main(line) == 2
    shown = capsys.readouterr()
    assert "the state is another model's: its weights" in shown.err and shown.out == ""
    with safe_open(state, "pt") as file:
        metadata = file.metadata()

    tensors = load_file(state)
    name = next(name for name in tensors if name.endswith(".sums"))
    tensors[name] = tensors[name][..., :-1].contiguous()
    save_file(tensors, state, {**metadata, "checksum": checksum(tensors, json.loads(metadata["facts"]))})
    assert cli.main(["generate", str(checkpoint), "--state", str(state), "--prompt", MORE]) == 2
    shown = capsys.readouterr()
    assert f"the state's '{name}' is torch.float32" in shown.err and shown.out == ""
    assert "Traceback" not in shown.err
