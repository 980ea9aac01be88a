"""Learned positions in training: RoBERTa's table begins behind the padding's row, and every table has an end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from byte_llama import byte_tokenizer, tiny_llama
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from linearize import distill
from linearize.decode.limits import learned_positions, position_table
from linearize.distill.positions import counted_from_zero
from linearize.distill.stage import StageTrainer
from linearize.errors import DataError

SIZES = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257}


def roberta() -> RobertaForCausalLM:
    torch.manual_seed(0)
    config = RobertaConfig(
        **SIZES, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=98, pad_token_id=1, initializer_range=0.2, is_decoder=True,
    )  # fmt: skip
    return RobertaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=98)).eval()


def opt() -> OPTForCausalLM:
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return OPTForCausalLM(
        OPTConfig(**SIZES, **sizes, max_position_embeddings=98, word_embed_proj_dim=32)
    ).eval()


@pytest.mark.parametrize("make", [roberta, gpt2, opt, tiny_llama])
def test_packed_positions_are_those_that_the_model_counts_itself(make) -> None:
    model = make()
    ids, positions = torch.arange(100, 124)[None], torch.arange(24)[None]
    with torch.no_grad(), counted_from_zero(model):
        given = model(input_ids=ids, position_ids=positions).logits
    with torch.no_grad():
        assert torch.equal(given, model(input_ids=ids).logits)
        plain = model(input_ids=ids, position_ids=positions).logits  # the hook is gone
    assert torch.equal(plain, given) == (make is not roberta)


@pytest.mark.parametrize(("make", "limit"), [(roberta, 96), (gpt2, 98), (opt, 98), (tiny_llama, None)])
def test_where_a_table_ends(make, limit) -> None:
    model = make()
    assert learned_positions(model) == limit
    if limit is not None:
        with torch.no_grad():
            model(input_ids=torch.full((1, limit), 65))
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, limit + 1), 65))


def test_training_reads_the_rows_that_the_teacher_was_trained_on(
    make_recipe, tmp_path: Path, monkeypatch
) -> None:
    folder, rows = tmp_path / "roberta", set()
    roberta().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    original = StageTrainer.training_step

    def training_step(self, model, *arguments):
        table = position_table(self.trained_model)
        hook = table.register_forward_pre_hook(lambda _, given: rows.update(given[0].unique().tolist()))
        try:
            return original(self, model, *arguments)
        finally:
            hook.remove()

    monkeypatch.setattr(StageTrainer, "training_step", training_step)
    recipe = make_recipe(tokens=256)
    recipe.eval.ablations = False
    distill.run(str(folder), recipe, tmp_path / "run")
    assert min(rows) == 2 and max(rows) <= 65


def test_a_sequence_beyond_the_table_is_refused_before_the_folder_is_made(
    make_recipe, tmp_path: Path
) -> None:
    gpt2().save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    recipe = make_recipe()
    recipe.data.length = 128
    with pytest.raises(
        DataError, match=r"data\.length=128 exceeds the model's 98 learned positions: use at most 98"
    ):
        distill.run(str(tmp_path / "gpt2"), recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
