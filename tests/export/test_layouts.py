"""Foreign layouts: what is written gives the logits of the conversion, by loops of its own; what cannot be is named."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import foreign
import laid_out
import pytest
import torch
from laid_out import DELTA, WINDOW, recipe
from safetensors.torch import load_file

import linearize
from linearize import cli
from linearize.config import compose
from linearize.errors import CheckpointError, UnsupportedModelError
from linearize.export.layouts import export_layout, fla, gguf_file
from linearize.export.layouts.body import body_of
from linearize.export.layouts.layer import Given
from linearize.mixers import LayerShape, normalize

FLA = {
    "gla": (recipe("gla"), {}),
    "gla, other epsilon, heads of another width": (recipe("gla"), {"rms_norm_eps": 3e-6, "head_dim": 12}),
    "gla, untied": (recipe("gla"), {"tie_word_embeddings": False}),
    "gla, identity and the output's own norm": (
        recipe(
            "gla",
            feature_map={"name": "identity"},
            normalizer={"name": "none"},
            output={"name": "norm"},
            gate={"name": "low_rank", "rank": 8},
        ),
        {},
    ),
    "gla, decays that follow nothing": (
        recipe("retnet", output={"name": "none"}, position={"name": "rope", "recurrent": False}),
        {},
    ),
    "gla, no decay": (recipe("gla", gate={"name": "none"}), {}),
    "delta_net": (DELTA, {"rms_norm_eps": 9.999999747378752e-06}),
    "gated_deltanet": ({**DELTA, "gate": {"name": "mamba2"}}, {}),
    "gla between softmax": (recipe("gla"), {"layers": [1]}),
    "gla between a teacher's windows": (
        recipe("gla"),
        {"layers": [1], "family": "mistral", "sliding_window": 6},
    ),
    "gla between windows": (recipe("gla"), {"layers": {"use": {"near": [0, 2]}}, "mixers": {"near": WINDOW}}),
    "windows alone": (WINDOW, {"family": "qwen2"}),
    "softmax": (recipe("softmax"), {}),
}
HEADS = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
"""llama.cpp has heads of 64 and 128."""
GGUF = {
    "arwkv7": (recipe("arwkv"), HEADS),
    "arwkv7, norm, shifts, no gate": (
        recipe(
            "arwkv",
            gate={"name": "rwkv7", "shift": True},
            update={"name": "rwkv7", "balanced": False, "shift": True, "rank": 8, "first_values": True},
            normalizer={"name": "group_norm"},
            output={"name": "none"},
        ),
        {"tie_word_embeddings": False, **HEADS},
    ),
    "arwkv7, every shift": (
        recipe(
            "arwkv",
            gate={"name": "rwkv7", "shift": True},
            update={
                "name": "rwkv7",
                "balanced": False,
                "shift": True,
                "shift_projections": True,
                "rank": 8,
                "first_values": True,
            },
            output={"name": "gate", "rank": 8, "shift": True},
        ),
        HEADS,
    ),
    "rwkv6qwen2": (
        recipe("radlads_rwkv6", output={"name": "none"}, gate={"name": "rwkv6", "rank": 8, "shift": True}),
        {"family": "qwen2", **HEADS},
    ),
    "rwkv6qwen2, decays per query head": (
        recipe(
            "radlads_rwkv6", output={"name": "none"}, gate={"name": "rwkv6", "per": "query_head", "rank": 8}
        ),
        HEADS,
    ),
}


def close(found, wanted, tolerance=1e-4):
    apart = (found - wanted.double()).abs().max() / wanted.abs().max()
    assert apart < tolerance, f"logits differ by {apart:.2g} of the largest"


def ours(folder, ids):
    with torch.no_grad():
        return linearize.load(folder, dtype=torch.float32)(ids).logits[0]


@pytest.mark.parametrize("name", FLA)
def test_fla_computes_the_same(tmp_path, capsys, name):
    mixer, changes = FLA[name]
    folder, ids = laid_out.saved(tmp_path / "run", mixer, **changes), laid_out.text(24)
    assert cli.main(["export", str(folder), "--layout", "fla"]) == 0
    assert f"checkpoint  {tmp_path / 'run-fla'}" in capsys.readouterr().out
    out = tmp_path / "run-fla"
    close(foreign.fla_logits(out, ids[0]), ours(folder, ids))
    assert (out / "tokenizer.json").is_file() and (out / "generation_config.json").is_file()
    assert "import fla.models" in (out / "README.md").read_text()
    assert not list(out.glob("*.py")) and "linearize" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("name", GGUF)
def test_llama_cpp_computes_the_same(tmp_path, name):
    mixer, changes = GGUF[name]
    folder, ids = laid_out.saved(tmp_path / "run", mixer, **changes), laid_out.text(24)
    said = export_layout(folder, "gguf", tmp_path / "run.gguf")
    assert name.split(",")[0] in said
    close(foreign.gguf_logits(tmp_path / "run.gguf", ids[0]), ours(folder, ids))


def test_a_bfloat16_checkpoint_keeps_its_bits(tmp_path):
    folder = laid_out.saved(tmp_path / "run", recipe("arwkv"), dtype=torch.bfloat16, **HEADS)
    export_layout(folder, "gguf", tmp_path / "run.gguf")
    ids = laid_out.text(12)
    close(foreign.gguf_logits(tmp_path / "run.gguf", ids[0]), ours(folder, ids))
    folder = laid_out.saved(tmp_path / "other", recipe("gla"), dtype=torch.bfloat16)
    export_layout(folder, "fla", tmp_path / "other-fla")
    close(foreign.fla_logits(tmp_path / "other-fla", ids[0]), ours(folder, ids))
    assert json.loads((tmp_path / "other-fla" / "config.json").read_text())["dtype"] == "bfloat16"
    weights = load_file(tmp_path / "other-fla" / "model.safetensors")
    kinds = {
        name.split(".", 4)[-1]: tensor.dtype for name, tensor in weights.items() if "layers.0.attn." in name
    }
    assert kinds["k_proj.weight"] == torch.bfloat16 and kinds["gk_proj.1.bias"] == torch.float32


REFUSED = {
    "lolcats": (
        "fla",
        ["window: sliding", "feature_map: hedgehog", "normalizer: running_sum", "RoPE"],
    ),
    "gated_deltanet": (
        "fla",
        ["short_conv: none", "beta has a bias", "learned scale", "output: a gate 1 + sigmoid"],
    ),
    "gsa_t2r": ("fla", ["values: as they are", "over all heads together", "a bias on its logits"]),
    "arwkv": ("fla", ["squared ReLU", "normalizer: none"]),
    "radlads_rwkv7": ("gguf", ["balanced keys", "RoPE in the recurrent branch"]),
    "radlads_rwkv6": ("gguf", ["1 + sigmoid"]),
    "swa_sinks": ("gguf", ["softmax alone"]),
}
NEAREST = {
    "lolcats": "GLA",
    "gated_deltanet": "Gated DeltaNet",
    "gsa_t2r": "GSA",
    "arwkv": "RWKV-7",
    "radlads_rwkv7": "arwkv7",
    "radlads_rwkv6": "rwkv6qwen2",
    "swa_sinks": "arwkv7",
}
SHAPE = LayerShape(9, 3, 64, 64, 0.125, model_dim=576, rotary="half")


def compared(layout, mixer, shape=SHAPE):
    given = Given(normalize(mixer), shape, 1e-5)
    if layout == "gguf":
        return gguf_file.compare([given])
    return fla.compare(
        [given],
        body_of(
            laid_out.teacher(
                hidden_size=576, num_hidden_layers=1, num_attention_heads=9, num_key_value_heads=3
            ).config
        ),
    )


@pytest.mark.parametrize("name", REFUSED)
def test_what_differs_is_listed(name):
    layout, words = REFUSED[name]
    layer, differences = compared(layout, recipe(name))
    assert layer.name == NEAREST[name]
    said = "\n".join(map(str, differences))
    for word in words:
        assert word in said


def test_nothing_is_left_of_a_refused_export(tmp_path):
    folder = laid_out.saved(tmp_path / "run", recipe("lolcats"))
    for layout, nearest in (("fla", "fla's GLA"), ("gguf", "llama.cpp's")):
        with pytest.raises(UnsupportedModelError, match=f"Nearest is {nearest}"):
            export_layout(folder, layout, tmp_path / "out")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["run"]


GLA = recipe("gla")
ARWKV = recipe("arwkv")
RWKV6 = recipe("radlads_rwkv6", output={"name": "none"})
PARTS = [
    ("fla", GLA, {"short_conv": {"name": "depthwise"}}, "short_conv"),
    ("fla", GLA, {"feature_map": {"name": "elu"}}, "feature_map"),
    ("fla", GLA, {"feature_map": {"name": "identity", "l2_normalize": True}}, "feature_map"),
    ("fla", GLA, {"gate": {"name": "low_rank", "divisor": 8}}, "gate"),
    ("fla", GLA, {"gate": {"name": "low_rank", "rank": 17}}, "gate"),
    ("fla", GLA, {"update": {"name": "additive", "start": True}}, "update"),
    ("fla", GLA, {"normalizer": {"name": "group_norm", "kind": "layer"}}, "normalizer"),
    ("fla", GLA, {"normalizer": {"name": "none"}}, "normalizer"),
    ("fla", GLA, {"output": {"name": "gate"}}, "output"),
    ("fla", GLA, {"output": {"name": "norm"}}, "output"),
    ("fla", GLA, {"position": {"name": "rope", "recurrent": True}}, "position"),
    ("fla", GLA, {"position": {"name": "selective_rope", "recurrent": False}}, "position"),
    ("fla", DELTA, {"short_conv": {**DELTA["short_conv"], "activation": "none"}}, "short_conv"),
    ("fla", DELTA, {"short_conv": {**DELTA["short_conv"], "roles": "qk"}}, "short_conv"),
    ("fla", DELTA, {"feature_map": {"name": "relu"}}, "feature_map"),
    ("fla", DELTA, {"update": {**DELTA["update"], "bias": True}}, "update.bias"),
    ("fla", DELTA, {"update": {**DELTA["update"], "rescales": True}}, "update.rescales"),
    ("fla", DELTA, {"normalizer": {"name": "none"}, "output": {"name": "norm"}}, "epsilon"),
    ("fla", DELTA, {"gate": {"name": "scalar"}}, "gate"),
    ("gguf", ARWKV, {"update": {"name": "rwkv7"}}, "update.balanced"),
    ("gguf", ARWKV, {"normalizer": {"name": "group_norm", "kind": "rms"}}, "normalizer"),
    ("gguf", ARWKV, {"output": {"name": "norm"}}, "output"),
    ("gguf", ARWKV, {"short_conv": {"name": "depthwise"}}, "short_conv"),
    ("gguf", ARWKV, {"feature_map": {"name": "identity", "l2_normalize": True}}, "feature_map"),
    ("gguf", ARWKV, {"output": {**ARWKV["output"], "constant": True}}, "output.constant"),
    ("gguf", RWKV6, {"output": {"name": "constant"}}, "output"),
    ("fla", GLA, {"output": {"name": "constant"}}, "output"),
    ("fla", DELTA, {"output": {"name": "constant"}}, "output"),
    ("gguf", RWKV6, {"update": {"name": "rwkv6", "bonus": True}}, "update"),
    ("gguf", RWKV6, {"normalizer": {"name": "group_norm"}}, "normalizer"),
    ("gguf", RWKV6, {"position": {"name": "rope", "recurrent": True}}, "position"),
]


@pytest.mark.parametrize(("layout", "mixer", "change", "part"), PARTS)
def test_every_part_of_a_mixer_is_looked_at(layout, mixer, change, part):
    assert compared(layout, mixer)[1] == []
    differences = compared(layout, {**mixer, **change})[1]
    assert [difference.part for difference in differences] == [part]


def test_the_overrides_that_the_docs_offer():
    lines = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8").splitlines()
    offered = [shlex.split(line)[3:] for line in lines if line.startswith("linearize run MODEL ")]
    assert len(offered) == 6
    for name, *overrides in offered:
        mixer = compose(name, overrides).mixer
        assert min(len(compared(layout, mixer)[1]) for layout in ("fla", "gguf")) == 0, name


def test_windows_of_softmax_layers_are_looked_at():
    assert compared("fla", WINDOW)[1] == []
    for change in ({"first": 4}, {"sinks": "learned"}, {"name": "terraced"}):
        differences = compared("fla", {**WINDOW, "window": {**WINDOW["window"], **change}})[1]
        assert [difference.part for difference in differences] == ["window"]


def test_heads_that_llama_cpp_has_not():
    small = LayerShape(4, 2, 8, 8, 0.35, model_dim=32, rotary="half")
    for mixer in (ARWKV, RWKV6):
        assert [str(one) for one in compared("gguf", mixer, small)[1]] == ["heads: of 8, there of 64 or 128"]
    wide = LayerShape(8, 2, 64, 64, 0.125, model_dim=576, rotary="half")
    assert "in a width of 576" in str(compared("gguf", ARWKV, wide)[1][0])


BODIES = [
    ({"family": "qwen2"}, "a bias on the q projection"),
    ({"mlp_bias": True}, "the tensor model.layers.0.mlp.gate_proj.bias"),
    ({"hidden_act": "gelu"}, "an MLP with gelu"),
]


@pytest.mark.parametrize(("changes", "words"), BODIES)
def test_a_body_that_is_not_llamas_is_named(tmp_path, changes, words):
    folder = laid_out.saved(tmp_path / "run", recipe("gla"), **changes)
    with pytest.raises(UnsupportedModelError, match=words):
        export_layout(folder, "fla", tmp_path / "out")


def test_another_family_is_named(tmp_path):
    from transformers import GemmaConfig, GemmaForCausalLM

    from linearize import export, surgery

    config = GemmaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = surgery.convert(GemmaForCausalLM(config).eval(), recipe("gla"))
    folder = export.save(model, tmp_path / "run", tokenizer=laid_out.tokenizer(), base="tiny")
    for layout in ("fla", "gguf"):
        with pytest.raises(UnsupportedModelError, match=r"gemma \(norms that multiply by 1 \+ weight"):
            export_layout(folder, layout, tmp_path / "out")


def test_softmax_layers_that_fla_has_not(tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    folder = laid_out.saved(tmp_path / "run", recipe("gla"), [1], rope_parameters=rope)
    with pytest.raises(UnsupportedModelError, match="rotary positions of type linear"):
        export_layout(folder, "fla", tmp_path / "out")
    # where no layer rotates, how it would have is no matter
    folder = laid_out.saved(tmp_path / "run", recipe("gla"), rope_parameters=rope)
    export_layout(folder, "fla", tmp_path / "out")
    folder = laid_out.saved(tmp_path / "run", recipe("gla"), [1], head_dim=12)
    with pytest.raises(UnsupportedModelError, match="4 heads of 12 in a width of 32"):
        export_layout(folder, "fla", tmp_path / "other")


def test_what_the_weights_decide(tmp_path):
    """Decays that a bound of ours would change are refused, those that never come there are not."""
    for rank, refused in ((2, False), (64, True)):
        fast = {"name": "rwkv6", "slow": -1.0, "fast": 1.4, "rank": rank}
        folder = laid_out.saved(tmp_path / f"run{rank}", {**RWKV6, "gate": fast}, stirred=0, **HEADS)
        if refused:
            with pytest.raises(UnsupportedModelError, match=r"gate: decays that stop at exp\(-5\)"):
                export_layout(folder, "gguf", tmp_path / "out")
        else:
            export_layout(folder, "gguf", tmp_path / "out")


def test_the_tokenizer_is_the_same(tmp_path):
    from gguf import GGUFReader

    folder = laid_out.saved(tmp_path / "run", recipe("arwkv"), **HEADS)
    export_layout(folder, "gguf", tmp_path / "run.gguf")
    fields = GGUFReader(tmp_path / "run.gguf").fields
    said = {name.removeprefix("tokenizer."): field.contents() for name, field in fields.items()}
    assert (said["ggml.model"], said["ggml.pre"], said["ggml.merges"]) == ("gpt2", "gpt-2", ["t h"])
    tokens = laid_out.tokenizer()
    assert said["ggml.tokens"][: len(tokens)] == tokens.convert_ids_to_tokens(list(range(len(tokens))))
    assert said["ggml.token_type"] == [1] * 257 + [3] * 3 + [5] * 4
    assert said["ggml.eos_token_id"] == tokens.eos_token_id and not said["ggml.add_bos_token"]


def test_a_tokenizer_that_gguf_cannot_say(tmp_path):
    import byte_llama

    from linearize import export

    folder = laid_out.saved(tmp_path / "run", recipe("arwkv"), **HEADS)
    export.save(linearize.load(folder), folder, tokenizer=byte_llama.byte_tokenizer())
    with pytest.raises(UnsupportedModelError, match=r"the tokenizer .* is none of the byte-level BPE kinds"):
        export_layout(folder, "gguf", tmp_path / "out")


def test_faults_of_the_call(tmp_path, capsys):
    folder = laid_out.saved(tmp_path / "run", recipe("gla"))
    with pytest.raises(linearize.errors.LinearizeError, match="did you mean 'gguf'"):
        export_layout(folder, "ggfu", tmp_path / "out")
    with pytest.raises(linearize.errors.LinearizeError, match="give another place"):
        export_layout(folder, "fla", folder)
    (folder / "adapter").mkdir()
    with pytest.raises(CheckpointError, match="keeps adapters beside its weights"):
        export_layout(folder, "fla", tmp_path / "out")
    laid_out.teacher().save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="no converted checkpoint"):
        export_layout(tmp_path / "plain", "fla", tmp_path / "out")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    assert cli.main(["export", str(folder), "--layout", "fla", "--out", str(tmp_path / "there")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert cli.main(["export", str(folder), "--layout", "fla", "--device", "cpu"]) == 2
    assert "--device: layouts are written on the CPU" in capsys.readouterr().err
    assert cli.main(["export", str(folder), "--layout", "fla", "--quantize", "int8"]) == 2
    assert "not allowed with argument" in capsys.readouterr().err
