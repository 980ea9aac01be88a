"""The command line's whole job on a tiny model: inspect, run, eval, generate, and what a finished folder refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from linearize import cli

SMALL = [
    "data.length=48",
    "eval.length=48",
    "eval.max_windows=2",
    "mixer.window.size=8",
    "mixers.longer.window.size=16",
    "layers.use.longer=[1]",
    "stages.distill.data.length=48",
    "stages.distill.tokens=480",
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A two-layer Llama over bytes, as an ordinary checkpoint."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory) -> Path:
    """The folder of a run that has ended."""
    out = tmp_path_factory.mktemp("runs") / "first"
    assert cli.main(["run", str(teacher), "demo", *SMALL, "--out", str(out)]) == 0
    return out


def test_run_leaves_the_promised_folder(finished):
    for name in (
        "recipe.yaml",
        "plan.json",
        "metrics.jsonl",
        "results.json",
        "environment.json",
        "report.md",
    ):
        assert (finished / name).is_file(), name
    assert (finished / "checkpoint" / "config.json").is_file()
    names = [row["name"] for row in json.loads((finished / "results.json").read_text())["rows"]]
    assert names[0] == "teacher" and "linear branch off" in names


def test_a_finished_folder_is_not_written_over(finished, teacher, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert cli.main(["run", str(teacher), "demo", *SMALL, "--out", str(finished)]) == 2
    assert "--out" in capsys.readouterr().err
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert after == before


def test_inspect_loads_no_weights(teacher, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((teacher / "config.json").read_bytes())
    assert cli.main(["inspect", str(tmp_path), "lolcats", "--length", "4096"]) == 0
    out = capsys.readouterr().out
    assert "sliding 64 + hedgehog" in out and "break-even" in out and "at 4,096 tokens" in out
    assert cli.main(["inspect", str(tmp_path), "lolcats", "layers=[7]"]) == 2
    assert "no attention layer 7" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path), "lolcats", "layers=[7]", "stages.recover.lora.rank=999"]) == 2
    err = capsys.readouterr().err
    assert "2 problems" in err and "no attention layer 7" in err and "lora.rank: 999 is wider" in err


def test_inspect_says_that_the_weights_are_damaged(teacher, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((teacher / name).read_bytes()[:5000])
    assert cli.main(["inspect", str(tmp_path), "lolcats"]) == 0
    said = capsys.readouterr()
    assert "converted   2 of 2 attention layers" in said.out
    assert "model.safetensors is corrupt or truncated" in said.err and "config alone" in said.err


def test_a_teacher_without_a_tokenizer_is_refused_before_the_run_folder_is_made(teacher, tmp_path, capsys):
    model, out = tmp_path / "model", tmp_path / "run"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_bytes((teacher / name).read_bytes())
    assert cli.main(["run", str(model), "demo", *SMALL, "--out", str(out)]) == 2
    assert "holds no tokenizer" in capsys.readouterr().err and not out.exists()


def test_only_the_packages_own_words_are_shown(finished, teacher, tmp_path, capfd):
    out = tmp_path / "run"
    settings = [*SMALL, "data.source=" + str(tmp_path / "text.txt"), "data.validation=builtin"]
    (tmp_path / "text.txt").write_text("The river rose in spring, and the miller moved his corn. " * 4)
    assert cli.main(["run", str(teacher), "demo", *settings, "--out", str(out)]) == 0
    err = capfd.readouterr().err
    assert "text.txt holds 192 of the 480 tokens asked for: it is repeated" in err
    shown = ("eval ", "stage ", "calibrate ", str(tmp_path))
    lines = [line for line in err.splitlines() if not line.startswith(shown)]
    assert lines == ["checking the export: a fresh process loads it and compares it with the model ..."]
    assert cli.main(["generate", str(finished), "--prompt", "The sea", "--max-new-tokens", "5"]) == 0
    assert capfd.readouterr().err == ""


def test_generate_is_the_same_again_and_refuses_a_chat_without_a_template(finished, capsys):
    arguments = ["generate", str(finished), "--prompt", "The sea", "--max-new-tokens", "5"]
    assert cli.main(arguments) == 0
    first = capsys.readouterr().out
    assert first.startswith("The sea")
    assert cli.main([*arguments[:1], str(finished / "checkpoint"), *arguments[2:]]) == 0
    assert capsys.readouterr().out == first
    for options in (["--temperature", "0.9", "--top-p", "0.9", "--seed", "3"], ["--num-beams", "2"]):
        assert cli.main([*arguments, *options]) == 0
        assert capsys.readouterr().out.startswith("The sea")
    assert cli.main([*arguments, "--chat"]) == 2
    assert "chat template" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_says_what_to_do(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("layers: all\n")
    assert cli.main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "--resume" in capsys.readouterr().err
