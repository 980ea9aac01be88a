"""Loading what resolve found."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from linearize.errors import CheckpointError, UnsupportedModelError
from linearize.models import load_config, load_teacher, load_tokenizer


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_checkpoint_without_a_tokenizer_loads(checkpoint):
    model, tokenizer = load_teacher(str(checkpoint), dtype="float64")
    assert tokenizer is None
    assert model.dtype == torch.float64 and not model.training


def test_the_attention_implementation_can_be_chosen(checkpoint):
    model, _ = load_teacher(str(checkpoint), attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_a_soft_cap_is_computed(tmp_path):
    """By transformers before 5.18 as well, which takes sdpa for Gemma 2 unasked: that leaves the cap out."""
    family, ids = tiny.model("gemma2"), tiny.tokens()
    family.save_pretrained(tmp_path)
    model, _ = load_teacher(str(tmp_path))
    uncapped = tiny.model("gemma2", attn_logit_softcapping=None)
    with torch.no_grad():
        found, wanted, other = (x(ids).logits for x in (model, family, uncapped))
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(found, wanted)
    assert (found - other).abs().max() > 1e-2


def test_a_missing_tokenizer_is_an_error_where_one_is_needed(checkpoint):
    with pytest.raises(CheckpointError, match=r"holds no tokenizer .*copy the tokenizer's files"):
        load_tokenizer(str(checkpoint))


def test_a_damaged_tokenizer(checkpoint):
    (checkpoint / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* cannot be loaded"):
        load_teacher(str(checkpoint))


def test_a_tensor_that_is_not_there_is_not_made_up(checkpoint):
    index = checkpoint / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    name = "model.layers.1.self_attn.q_proj.weight"
    shard = checkpoint / weight_map.pop(name)
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    edit(index, weight_map=weight_map)
    with pytest.raises(CheckpointError, match=f"lacks 1 of the model's tensors \\({name}\\)"):
        load_teacher(str(checkpoint))


def test_weights_of_another_shape(checkpoint):
    edit(checkpoint / "config.json", intermediate_size=96)
    with pytest.raises(
        CheckpointError, match=r"12 tensors do not fit config\.json \(model\.layers\.0\.mlp\."
    ):
        load_teacher(str(checkpoint))


def test_an_unknown_model_type(checkpoint):
    edit(checkpoint / "config.json", model_type="no_such_model", auto_map={"AutoConfig": "code.Config"})
    (checkpoint / "code.py").write_text("raise RuntimeError('ran code from the checkpoint')")
    with pytest.raises(UnsupportedModelError, match="never run"):
        load_config(str(checkpoint))


def test_a_model_that_is_no_decoder(checkpoint):
    edit(checkpoint / "config.json", model_type="clip")
    with pytest.raises(UnsupportedModelError, match="no causal language model"):
        load_teacher(str(checkpoint))


def test_options_of_a_call_that_a_config_holds_by_chance_are_left_out(checkpoint):
    edit(checkpoint / "config.json", output_attentions=True, output_hidden_states=True, return_dict=False)
    model, _ = load_teacher(str(checkpoint))
    found = model(torch.tensor([[1, 2, 3]]))
    assert found.hidden_states is None and found.attentions is None
    model.save_pretrained(checkpoint / "again")  # transformers refuses to, where sdpa is to give attentions


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_model_that_training_saved_without_a_cache_has_one(checkpoint, name):
    """Otherwise each token that it writes reads the whole text again, converted or not."""
    edit(checkpoint / name, use_cache=False)
    if name == "config.json":
        (checkpoint / "generation_config.json").unlink()
    model, _ = load_teacher(str(checkpoint))
    ids = torch.tensor([[1, 2, 3]])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, return_dict_in_generate=True
    )
    assert made.past_key_values.get_seq_length() == 4
    model.save_pretrained(checkpoint / "again")
    kept = json.loads((checkpoint / "again" / "generation_config.json").read_text())
    assert kept.get("use_cache") is not False


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": ["x"] * 4},
        {"rope_type": "linear", "factor": 0},
        {"rope_type": "dynamic", "factor": True},
    ],
)
def test_scalings_of_positions_that_are_no_numbers(checkpoint, rope):
    edit(checkpoint / "config.json", rope_parameters={"rope_theta": 10000.0, **rope})
    with pytest.raises(CheckpointError, match=r"rope_parameters\.\w*factor must be a number above 0"):
        load_teacher(str(checkpoint))


def test_a_tokenizer_that_fails_in_use_only(tmp_path):
    """Unigram without an unknown token loads, and fails at the first character that it does not know."""
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([]))).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* cannot be loaded: .*unk_id"):
        load_tokenizer(tmp_path)
