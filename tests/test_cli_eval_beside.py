"""`linearize eval` with another teacher, another student or further controls in the folder of earlier scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from byte_llama import MIXER, byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM, BertConfig, GPT2Config

from linearize import cli, export, surgery

SUITE = "about: small\nmeasure:\n  - {task: text, length: 48, windows: 3}\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Two teachers, and a conversion of the first."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("first", "second")):
        tiny_llama(seed=seed).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    model = surgery.convert(tiny_llama(), MIXER)
    export.save(
        model,
        folder / "mine",
        tokenizer=byte_tokenizer(),
        base=str(folder / "first"),
        recipe={"mixer": MIXER},
    )
    (folder / "small.yaml").write_text(SUITE)
    return folder


def judged(models: Path, out: Path, *arguments: object) -> dict[tuple[str, str], float]:
    """(role, metric) -> value over all tokens, of the last measurement."""
    line = ["eval", *arguments, "--suite", models / "small.yaml", "--out", out]
    assert cli.main([str(part) for part in line]) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    return {(row["role"], row["metric"]): row["value"] for row in rows if not row["by"]}


def test_what_is_compared_is_measured_again_with_another_teacher_or_student(models, tmp_path, capsys):
    apart = judged(models, tmp_path / "apart", models / "mine", "--against", models / "second")
    judged(models, tmp_path / "one", models / "mine")
    kept = len(json.loads((tmp_path / "one" / "results.json").read_text())["rows"])
    again = judged(models, tmp_path / "one", models / "mine", "--against", models / "second")
    assert again["student", "kl"] == pytest.approx(apart["student", "kl"]) and apart["student", "kl"] > 0.5
    assert again["linear branch off", "kl"] == pytest.approx(apart["linear branch off", "kl"])
    # the control is the same model; what it is better or worse than is another
    other = judged(models, tmp_path / "one", models / "second", "--against", models / "first")
    expected = judged(models, tmp_path / "two", models / "second", "--against", models / "first")
    assert other["swa_sinks", "nll_difference"] == pytest.approx(expected["swa_sinks", "nll_difference"])
    before = (tmp_path / "one" / "results.json").read_bytes()
    capsys.readouterr()
    judged(models, tmp_path / "one", models / "mine")  # what was measured first stands
    assert (tmp_path / "one" / "results.json").read_bytes() == before and kept < len(
        json.loads(before)["rows"]
    )


def test_controls_of_one_name_or_of_the_name_of_a_role_stay_apart(models, tmp_path):
    for place, source in (("a/same", "first"), ("b/same", "second"), ("teacher", "second")):
        shutil.copytree(models / source, tmp_path / place)
    controls = [part for name in ("a/same", "b/same", "teacher") for part in ("--control", tmp_path / name)]
    found = judged(models, tmp_path / "out", models / "mine", *controls)
    assert found["same", "kl"] == pytest.approx(0, abs=1e-6) and found["same (2)", "kl"] > 0.5
    assert found["teacher (2)", "ppl"] == found["same (2)", "ppl"] != found["teacher", "ppl"]
    assert found["student", "kl"] > 0.1


def test_a_conversion_that_names_no_teacher_says_what_is_missing(models, tmp_path, capsys):
    for number, base in enumerate((None, 3)):
        folder = tmp_path / f"mine{number}"
        shutil.copytree(models / "mine", folder)
        note = json.loads((folder / "linearize.json").read_text())
        (folder / "linearize.json").write_text(json.dumps(note | {"base": base}))
        found = judged(models, tmp_path / f"out{number}", folder)
        assert {role for role, _ in found} == {"student", "linear branch off", "window off"}
        assert "does not say what it was converted from" in capsys.readouterr().err


def test_a_path_that_is_no_model_is_not_taken_for_a_missing_teacher(models, tmp_path, capsys):
    shutil.copytree(models / "mine", tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").unlink()
    for path, reason in (("nowhere", "no such file or folder"), ("cut", "has no weights")):
        assert cli.main(["eval", str(tmp_path / path)]) == 2
        said = capsys.readouterr().err
        assert reason in said and "--against" not in said
    note = models / "mine" / "linearize.json"
    moved = tmp_path / "moved"
    shutil.copytree(models / "mine", moved)
    (moved / "linearize.json").write_text(
        json.dumps({**json.loads(note.read_text()), "base": "/gone", "base_path": "/gone"})
    )
    assert cli.main(["eval", str(moved)]) == 2
    assert "converted from a model that is not here" in capsys.readouterr().err


def test_a_model_of_few_learned_positions_is_measured_within_them(tmp_path, capsys):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=256,
                        eos_token_id=257)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt")
    byte_tokenizer().save_pretrained(tmp_path / "gpt")
    (tmp_path / "small.yaml").write_text(
        "about: small\nmeasure:\n  - {task: text, length: 48, windows: 2}\n"
        "  - {task: generation, length: [16, 60], items: 1, new_tokens: 8, roles: [student]}\n"
    )
    found = judged(tmp_path, tmp_path / "out", tmp_path / "gpt")
    said = capsys.readouterr().err
    assert found["student", "generated"] <= 8 and ("swa_sinks", "ppl") in found
    assert (
        "no generation at 60 tokens: the model has 64 positions" in said
        and "generation at 16 tokens" not in said
    )


def test_an_encoder_is_refused_by_name_and_as_a_decoder_it_is_judged(tmp_path, capsys):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    (tmp_path / "small.yaml").write_text(SUITE)
    for decoder in (False, True):
        torch.manual_seed(0)
        config = BertConfig(vocab_size=259, is_decoder=decoder, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bert")
        byte_tokenizer().save_pretrained(tmp_path / "bert")
        line = ["eval", tmp_path / "bert", "--suite", tmp_path / "small.yaml", "--out", tmp_path / "out"]
        code = cli.main([str(part) for part in line])
        said = " ".join(capsys.readouterr().err.split())
        assert code == (0 if decoder else 2)
        assert decoder != (
            "not causal: what BertLMHeadModel says of a token depends on those behind it" in said
        )


def test_compare_never_tells_to_delete_what_is_not_its_own(tmp_path, capsys):
    mine = tmp_path / "thesis.json"
    mine.write_text("{}")
    assert cli.main(["compare", str(mine)]) == 2
    said = capsys.readouterr().err.replace(str(tmp_path), "")  # its name may say anything
    assert "no scores of format 1" in said and "elete" not in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", "a=a.txt", "--only", "passkey"], "--text: nothing that is measured reads it (passkey)"),
        (["--text", "a=a.txt", "--suite", "efficiency"], "reads it (prefill, decode)"),
        (["--suite", "tasks", "--tasks", "piqa", "--only", "text"], "--only with --suite tasks"),
        (["--shots", "0"], "--shots without --tasks"),
        (["--limit", "3"], "--limit without --tasks"),
        (["--limit", "0"], "--limit: must be a whole number above 0"),
        (["--roles", ""], "--roles: must name at least one, got ''"),
        (["--only", ","], "--only: must name at least one, got ','"),
        (["--tasks", " "], "--tasks: must name at least one"),
        (["--suite", ","], "--suite: must name at least one"),
        (["--task-data", "here"], "--task-data without --tasks"),
        (["--include-path", "here"], "--include-path without --tasks"),
        (["--control", "base", "--roles", "student"], "--control base: nothing is measured of it (--roles"),
        (["--control", "base", "--control", "a/other", "--roles", "base"], "--control a/other: nothing is"),
        (["--seed", "1", "--seed", "2"], "argument --seed: given twice (1 and 2); it takes one value"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(models, tmp_path, capsys, arguments, words):
    out = tmp_path / "out"
    assert cli.main(["eval", str(models / "mine"), "--out", str(out), *arguments]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_a_text_beside_a_task_that_reads_it_is_taken(models, tmp_path):
    (tmp_path / "mine.txt").write_text("the cat sat on the mat . " * 20)
    (tmp_path / "small.yaml").write_text(
        "about: small\nmeasure:\n  - {task: generation, length: 16, items: 1, new_tokens: 4, roles: [student]}\n"
    )
    line = ["eval", models / "mine", "--suite", tmp_path / "small.yaml", "--out", tmp_path / "out"]
    assert cli.main([str(part) for part in [*line, "--text", f"mine={tmp_path / 'mine.txt'}"]]) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert {row["task"] for row in rows} == {"generation: mine"}
