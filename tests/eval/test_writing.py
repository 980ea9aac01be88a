"""Decoding against prefill, faults of written text, and the crossover points of an efficiency suite."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from byte_llama import MIXER, TEXT, byte_tokenizer, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from linearize import surgery
from linearize.data import Document
from linearize.eval import dictation
from linearize.eval.cast import Entrant
from linearize.eval.efficiency import Efficiency, crossovers
from linearize.eval.measurement import Call, Setting, score
from linearize.eval.recall.answering import Cached
from linearize.eval.suite import Unit
from linearize.eval.writing import Decoding, Writing, distinct


@pytest.fixture
def setting(tmp_path) -> Setting:
    return Setting(byte_tokenizer(), {"": [Document.plain(TEXT)]}, tmp_path)


def measured(task, unit: Unit, model, setting: Setting) -> dict:
    steps: list[int] = []
    [unit] = task.units(unit, setting)
    call = Call(unit, Entrant("mine", "student", "", lambda: None), "key")
    rows = task.measure(model.eval(), call, setting, SimpleNamespace(advance=steps.append))
    assert sum(steps) <= task.tokens(unit, setting) <= 1.1 * sum(steps) + 16
    return {(row.metric, row.bucket): row for row in rows}


@pytest.mark.parametrize("convert", [False, True])
def test_decoding_predicts_what_prefill_does(setting, convert):
    model = surgery.convert(tiny_llama(), MIXER) if convert else tiny_llama()
    found = measured(Decoding(), Unit("decoding", 60), model, setting)
    assert found["decode_agreement", ""].value == 1.0 and found["decode_agreement", ""].n == 60
    assert found["decode_difference", ""].value < 1e-3


@pytest.mark.parametrize("layers", ["all", [0]])
@pytest.mark.parametrize("tokens", [1 + 64, 2 * 64, 150])
def test_the_step_that_a_gpu_captures_is_compared_as_well(setting, monkeypatch, layers, tokens):
    monkeypatch.setattr(dictation, "obstacles", lambda model: [])  # on a CPU it runs uncaptured
    model = surgery.convert(tiny_llama(), MIXER, layers)
    ids = setting.windows("", tokens, 1)[0]
    stepped, cached = (
        torch.cat([block.clone() for block in blocks])
        for blocks in (dictation.dictated(model.eval(), ids, 259), dictation._cached(model, ids))
    )
    assert stepped.shape == (tokens, 259) and torch.allclose(stepped, cached, atol=1e-4)
    found = measured(Decoding(), Unit("decoding", tokens), model, setting)
    assert found["decode_agreement", ""].value == 1.0 and found["decode_difference", ""].value < 1e-3


@pytest.mark.parametrize("kind", ["openai-gpt", "rwkv"])
def test_a_model_that_takes_no_cache_of_transformers_forgets_nothing(setting, kind):
    sizes = {"openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
             "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}}[kind]  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=259, **sizes)).eval()
    found = measured(Decoding(), Unit("decoding", 24), model, setting)
    assert found["decode_agreement", ""].value == 1.0 and found["decode_difference", ""].value < 1e-4
    ids = torch.arange(12)[None]
    read = Cached(model)
    read(ids[:, :8])
    apart = read.copy().every(ids[:, 8:11])  # a copy goes on by itself
    assert torch.allclose(read(ids[:, 8:9]), apart[:, 0], atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(
            read(ids[:, 9:]), model(input_ids=ids, use_cache=False).logits[:, -1], atol=1e-5
        )
    found = measured(
        Efficiency("prefill"), Unit("prefill", 8, {"batches": [1], "repeats": 1}), model, setting
    )
    metrics = {metric for metric, _ in found}
    assert "milliseconds" in metrics and "cache_bytes" not in metrics


def test_a_state_that_forgets_is_found(setting, monkeypatch):
    model = surgery.convert(tiny_llama(), MIXER)
    for layer in surgery.converted(model):
        step = layer.mixer.step
        monkeypatch.setattr(
            layer.mixer, "step", lambda q, k, v, step=step, **kw: step(q, k, torch.zeros_like(v), **kw)
        )
    found = measured(Decoding(), Unit("decoding", 60), model, setting)
    assert found["decode_difference", ""].value > 0.1


def test_what_is_written_is_kept_and_equals_generate(setting, tmp_path):
    model = tiny_llama()
    unit = Unit("generation", 20, {"items": 3, "new_tokens": 12})
    found = measured(Writing(), unit, model, setting)
    kept = json.loads((tmp_path / "samples" / "key.json").read_text())
    assert kept["role"] == "student" and len(kept["texts"]) == len(kept["prompts"]) == 3
    assert kept["prompts"] == [TEXT[start : start + 20] for start in (0, 20, 40)]
    ids = torch.tensor([byte_tokenizer()(prompt)["input_ids"] for prompt in kept["prompts"]])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    expected = [row[: row.index(257)] if 257 in row else row for row in made[:, ids.shape[1] :].tolist()]
    assert kept["texts"] == byte_tokenizer().batch_decode(expected)
    assert found["generated", ""].value == sum(map(len, expected)) / 3
    assert found["repetition", ""].value == pytest.approx(sum(1 - distinct(row, 4) for row in expected) / 3)


def test_distinct_n_grams():
    assert distinct([1, 2, 1, 2, 1], 1) == 2 / 5
    assert distinct([1, 2, 1, 2, 1], 2) == 2 / 4
    assert distinct([1], 2) == 1.0


def test_efficiency_of_a_conversion_on_a_cpu(setting):
    model = surgery.convert(tiny_llama(), MIXER)
    unit = Unit("prefill", 64, {"batches": [1, 8], "repeats": 2})
    found = measured(Efficiency("prefill"), unit, model, setting)
    assert {bucket for _, bucket in found} == {"1"}  # one sequence on a CPU
    row = found["milliseconds", "1"]
    assert row.low <= row.value <= row.high and row.n == 2
    assert found["tokens_per_second", "1"].value == pytest.approx(64e3 / row.value)
    longer = measured(Efficiency("prefill"), replace(unit, length=128), model, setting)
    assert longer["cache_bytes", "1"].value == found["cache_bytes", "1"].value > 0  # a state does not grow
    softmax = [
        measured(Efficiency("prefill"), replace(unit, length=n), tiny_llama(), setting)[
            "cache_bytes", "1"
        ].value
        for n in (64, 128)
    ]
    assert softmax[1] == 2 * softmax[0]
    decode = Unit("decode", 32, {"batches": [1], "steps": 16})
    assert measured(Efficiency("decode"), decode, model, setting)["milliseconds", "1"].value > 0
    assert Efficiency("decode").units(replace(decode, length=4096), setting) == []


def test_the_crossover_is_where_the_student_stays_ahead():
    def row(role, length, value):
        made = score("milliseconds", value, by="batch", bucket="1")
        return replace(made, role=role, task="decode", length=length, key=f"{role}{length}")

    teacher = [row("teacher", n, t) for n, t in ((128, 5.0), (512, 6.0), (1024, 8.0), (2048, 12.0))]
    ahead = [row("student", n, t) for n, t in ((128, 4.0), (512, 7.0), (1024, 7.0), (2048, 7.0))]
    [found] = crossovers([*teacher, *ahead])
    assert (found.metric, found.value, found.task, found.against) == (
        "crossover",
        1024,
        "decode, milliseconds",
        "teacher",
    )
    assert crossovers([*teacher, *(row("student", n, 20.0) for n in (128, 512, 1024, 2048))]) == []
    assert crossovers(teacher) == []
    assert (
        crossovers([*teacher, *(row("student", one.length, one.value) for one in teacher)]) == []
    )  # as much is no gain
