"""Quantized exports of a tiny model: what is stored how, that a fresh process reads it, and what is refused.

They need torchao (`make test-quantize`), which costs every process that imports transformers two seconds.
"""

from __future__ import annotations

import json

import byte_llama
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import linearize
from linearize import cli, export, surgery
from linearize.errors import CheckpointError, LinearizeError, UnsupportedModelError

pytest.importorskip("torchao")

from linearize.export.quantize import quantize
from linearize.export.quantized import codes

GATED = {
    "feature_map": {"name": "hedgehog"},
    "gate": {"name": "low_rank", "rank": 4},
    "window": {"name": "sliding", "size": 8, "overlap": True},
}
APART = {"int8": 0.04, "float8": 0.1, "int4": 0.3}
"""Norm of the difference to the plain model's logits, as a share of theirs: 8 bits, 3 bits of mantissa, 4 bits."""


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 259,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
        "eos_token_id": 257,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def saved(folder, dtype=torch.float32, layers=(0, 2), **changes):
    """An export with one layer of softmax between two converted ones, whose gate is a linear layer of the mixer's."""
    model = surgery.convert(llama(**changes).to(dtype), GATED, list(layers))
    return export.save(model, folder, tokenizer=byte_llama.byte_tokenizer(), base="tiny")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("made") / "plain")


@pytest.mark.parametrize("form", ["int8", "int4", "float8"])
def test_the_command(plain, tmp_path, capsys, form):
    out = tmp_path / "made"
    assert cli.main(["export", str(plain), "--quantize", form, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"checkpoint  {out}" in said and f"linearize eval {out}" in said
    model, before = linearize.load(out), linearize.load(plain)
    assert len(codes(model)) == 3 * 7 and all(name.endswith("_proj.weight") for name in codes(model))
    for name, tensor in model.state_dict().items():
        if name not in codes(model):
            assert torch.equal(tensor, before.state_dict()[name]), name
    ids = torch.randint(0, 255, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted = model(ids).logits, before(ids).logits
        assert 0 < (found - wanted).norm() / wanted.norm() < APART[form]
        a = model.generate(ids, max_new_tokens=6, do_sample=False)
        b = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(a, b)
    card = (out / "README.md").read_text()
    assert f"the weights of 21 linear layers are {form}" in card and "pip install torchao" in card
    stored = load_file(out / "model.safetensors")
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in map(str, out.iterdir()))
    assert any(x.dtype in (torch.int8, torch.float8_e4m3fn) for x in stored.values())
    with safe_open(out / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["tensor_names"])


def test_mixers_stay_in_float32_in_a_model_of_bfloat16(tmp_path):
    folder = saved(tmp_path / "plain", torch.bfloat16)
    model = linearize.load(quantize(folder, "int8", tmp_path / "made"))
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {kind for name, kind in kinds.items() if ".mixer." in name} == {torch.float32}
    assert kinds["model.embed_tokens.weight"] == torch.bfloat16
    with torch.no_grad():
        cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    state = cache.layers[0].state.tensors
    assert state["sums"].dtype == torch.float32


def test_its_check_compares_codes_and_scales(plain, tmp_path, monkeypatch):
    from linearize.export import reloading, verify

    asked = []

    def compared(settings, work):
        asked.append(settings)
        return reloading.compare(settings, package=True)

    monkeypatch.setattr(verify, "in_new_process", compared)
    quantize(plain, "int8", tmp_path / "made")
    parts = [found for found in asked[0]["tensors"].values() if isinstance(found[2], list)]
    assert len(parts) == 21 and all(len(found[2]) >= 2 for found in parts), "codes and scales are compared"


def test_eval_and_generate_take_it(plain, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = quantize(plain, "int8", tmp_path / "made")
    text = tmp_path / "a.txt"
    text.write_text(byte_llama.TEXT)
    suite = tmp_path / "suite.yaml"
    suite.write_text("name: short\ntext: {lengths: [64], windows: 2}\n")
    assert cli.main(["generate", str(out), "--prompt", "In the year", "--max-new-tokens", "4"]) == 0
    # the teacher is no folder here
    note = json.loads((out / "linearize.json").read_text())
    (out / "linearize.json").write_text(json.dumps({**note, "base": ""}))
    line = ["eval", str(out), "--suite", "quick", "--only", "text", "--text", f"a={text}", "--out", "eval"]
    assert cli.main(line) == 0
    assert "made (student)" in capsys.readouterr().out


def test_a_state_of_a_quantized_model(plain, tmp_path):
    model = linearize.load(quantize(plain, "int8", tmp_path / "made"))
    tokenizer = byte_llama.byte_tokenizer()
    path = linearize.save_state(
        linearize.read_state(model, tokenizer, "In the year 1500"), tmp_path / "a.state"
    )
    assert linearize.load_state(path, model, tokenizer).tokens == 16
    with pytest.raises(LinearizeError, match="another model's"):
        linearize.load_state(path, linearize.load(plain))


def test_what_cannot_be_quantized(plain, tmp_path, capsys, monkeypatch):
    made = quantize(plain, "int8", tmp_path / "made")
    with pytest.raises(CheckpointError, match="is quantized already"):
        quantize(made, "int4", tmp_path / "again")
    with pytest.raises(LinearizeError, match="is the checkpoint that is to be quantized"):
        quantize(plain, "int8", plain)
    with pytest.raises(LinearizeError, match="there are int8, int4, float8"):
        quantize(plain, "int3", tmp_path / "x")
    teacher = tmp_path / "teacher"
    llama().save_pretrained(teacher)
    with pytest.raises(CheckpointError, match="is no converted checkpoint"):
        quantize(teacher, "int8", tmp_path / "x")
    odd = saved(tmp_path / "odd", hidden_size=40, intermediate_size=64)
    with pytest.raises(UnsupportedModelError, match=r"shares a scale among 32 inputs.* has 40"):
        quantize(odd, "int4", tmp_path / "x")
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64))
    folder = export.save(surgery.convert(gpt2, byte_llama.MIXER, "all"), tmp_path / "gpt2")
    with pytest.raises(UnsupportedModelError, match=r"none of its layers is an nn\.Linear"):
        quantize(folder, "int8", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert cli.main(["export", str(plain), "--quantize", "int8", "--out", str(made)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert cli.main(["export", str(plain), "--quantize", "int9"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_a_quantized_teacher_is_refused_before_anything_is_trained(plain, tmp_path, capsys):
    made = quantize(plain, "int8", tmp_path / "made")
    assert cli.main(["run", str(made), "demo", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "its weights are quantized (torchao)" in said and "unquantized checkpoint" in said
    assert not (tmp_path / "run").exists()


def test_without_torchao_it_says_what_to_install(plain, tmp_path, monkeypatch):
    import importlib.util

    made = quantize(plain, "int8", tmp_path / "made")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else found(name, *rest)
    )
    for use in (lambda: linearize.load(made), lambda: quantize(plain, "int8", tmp_path / "x")):
        with pytest.raises(
            LinearizeError,
            match=r"needs torchao, which is not installed: pip install 'linearize\[quantize\]'",
        ):
            use()


@pytest.mark.parametrize("damage", ["cut", "metadata", "codes"])
def test_a_damaged_quantized_checkpoint_is_refused(plain, tmp_path, damage):
    from safetensors.torch import save_file

    made = quantize(plain, "int8", tmp_path / "made")
    file = made / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("qdata"))
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "metadata":
        save_file(tensors, file, {"format": "pt"})
    else:
        save_file({key: x for key, x in tensors.items() if key != name}, file, metadata)
    with pytest.raises(CheckpointError):
        linearize.load(made)


@pytest.mark.parametrize("form", ["int8", "int4", "float8"])
def test_codes_and_scales_of_another_shape_are_refused(plain, tmp_path, form):
    """A scale too few would be spread over every channel, and nothing but the answers would tell."""
    from safetensors.torch import save_file

    made = quantize(plain, form, tmp_path / "made")
    file = made / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    first = "model.layers.0.self_attn.q_proj._weight_"
    assert codes(linearize.load(made))
    for changed in (
        {f"{first}scale": tensors[f"{first}scale"][:1]},
        {f"{first}scale": tensors[f"{first}scale"].double()},
        {f"{first}qdata": tensors[f"{first}qdata"][:32], f"{first}scale": tensors[f"{first}scale"][:32]},
    ):
        save_file({**tensors, **{name: x.contiguous() for name, x in changed.items()}}, file, metadata)
        with pytest.raises(CheckpointError) as error:
            linearize.load(made)
        if form == "int8":  # torchao looks at those of int4 itself
            assert "q_proj.weight" in str(error.value) and "should hold values." in str(error.value)


def test_an_edited_plan_of_codes_is_refused(plain, tmp_path):
    made = quantize(plain, "int8", tmp_path / "made")
    config = json.loads((made / "config.json").read_text())
    config["linearize"]["mixers"]["default"]["window"]["size"] = 5
    note = json.loads((made / "linearize.json").read_text())
    note["recipe"] = {"mixer": GATED}
    (made / "linearize.json").write_text(json.dumps(note))
    (made / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="window"):
        linearize.load(made)
