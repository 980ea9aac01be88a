"""Left-padded rows without position_ids, as transformers' own collators make them, are the rows alone."""

from __future__ import annotations

import inspect
import warnings

import odd
import pytest
import tiny
import torch
from compositions import small
from transformers import AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

import linearize
from linearize import surgery
from linearize.config import compose
from linearize.errors import UnsupportedModelError
from linearize.surgery.positions import is_relative

SMALL = {
    "llama": {"num_hidden_layers": 2},
    "gemma3": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neox": {"num_hidden_layers": 2},
}
RECIPES = ("hedgehog", "t2r", "based", "radlads_rwkv7", "lolcats", "lawcat", "softmax")
PAD = 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for family, changes in SMALL.items():
        made[family] = tmp_path_factory.mktemp(family)
        tiny.model(family, **changes).save_pretrained(made[family])
    return made


def student(folder, mixer):
    model = surgery.convert(AutoModelForCausalLM.from_pretrained(folder).eval(), mixer)
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    return model


def close(out, expected):
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(out, expected, atol=1e-5 * scale, rtol=0)


def cache_name(model):
    # the first name is that of transformers 5.24, the second the one before it
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_left_padded_row_is_the_row_alone(folders, family, recipe):
    model = student(folders[family], small(compose(recipe, []).mixer))
    ids, mask, _ = tiny.left_padded(2, 18, PAD)
    with torch.no_grad():
        alone = model(ids[:1, PAD:]).logits[0]
        close(model(ids, attention_mask=mask).logits[0, PAD:], alone)
        close(model(ids, mask).logits[0, PAD:], alone)
        close(model.base_model(ids, mask, None)[0][0, PAD:], model.base_model(ids[:1, PAD:])[0][0])
        given = {cache_name(model): DynamicCache(config=model.config)}
        pieces = [(0, 3), (3, 11), (11, 12), (12, 18)]
        outs = [model(ids[:, a:b], attention_mask=mask[:, :b], **given).logits for a, b in pieces]
    close(torch.cat(outs, 1)[0, PAD:], alone)


@pytest.mark.parametrize("family", SMALL)
def test_the_teacher_answers_as_it_did(folders, family):
    teacher = AutoModelForCausalLM.from_pretrained(folders[family]).eval()
    model = student(folders[family], tiny.HEDGEHOG)
    ids, mask, _ = tiny.left_padded(2, 18, PAD)
    right = mask.flip(1)
    with torch.no_grad(), surgery.mode(model, "teacher"):
        out, expected = (m(ids, attention_mask=mask).logits for m in (model, teacher))
        close(out[mask.bool()], expected[mask.bool()])
        for padding in (None, right, torch.ones_like(mask)):
            assert torch.equal(*(m(ids, attention_mask=padding).logits for m in (model, teacher)))


def test_signature_and_saved_model_stay(folders, tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(folders["llama"])
    model = student(folders["llama"], tiny.HEDGEHOG)
    for ours, theirs in ((model, teacher), (model.base_model, teacher.base_model)):
        assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
    linearize.save(model, tmp_path / "saved")
    loaded = linearize.load(tmp_path / "saved")
    ids, mask, _ = tiny.left_padded(2, 18, PAD)
    with torch.no_grad():
        close(loaded(ids, attention_mask=mask).logits[0, PAD:], model(ids[:1, PAD:]).logits[0])


def test_the_trainer_sees_rows_alone(folders, tmp_path):
    """The loss of a left-padded row, which has no position_ids, is the loss of the row."""
    model = student(folders["llama"], tiny.LAWCAT)
    ids, mask, _ = tiny.left_padded(1, 18, PAD)
    labels = ids[0].clone()
    labels[: PAD + 1] = -100  # padding predicts nothing, the row's first token neither
    row = {"input_ids": ids[0], "attention_mask": mask[0], "labels": labels}
    losses = []
    for pad in (0, PAD):
        data = [{name: x[pad:] for name, x in row.items()}]
        how = TrainingArguments(tmp_path, report_to=[], use_cpu=True, disable_tqdm=True)
        losses.append(Trainer(model, how, eval_dataset=data).evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_absolute_positions_are_warned_of_once():
    model = surgery.convert(tiny.model("gpt2", n_layer=2), tiny.HEDGEHOG)
    ids, mask, positions = tiny.left_padded(2, 18, PAD)
    with torch.no_grad():
        with pytest.warns(UserWarning, match=r"give position_ids = \(attention_mask"):
            model(ids, attention_mask=mask)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(ids, attention_mask=mask)
            close(
                model(ids, attention_mask=mask, position_ids=positions).logits[0, PAD:],
                model(ids[:1, PAD:]).logits[0],
            )


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_taken_for_relative_is(family):
    model = surgery.convert(tiny.model(family), tiny.SOFTMAX)
    ids = tiny.tokens(1, 6)
    with torch.no_grad():
        out, moved = (model(ids, position_ids=torch.arange(6)[None] + n).logits for n in (0, 9))
    same = torch.allclose(out, moved, atol=1e-4 * out.abs().max().item())
    assert is_relative(model.base_model) == same


def test_a_rotation_inside_the_attention_is_relative():
    teacher = odd.model("gptj")
    odd.skip_before_the_interface(teacher)
    model = surgery.convert(teacher, tiny.HEDGEHOG)
    ids, mask, _ = tiny.left_padded(2, 18, PAD)
    with torch.no_grad():
        close(model(ids, attention_mask=mask).logits[0, PAD:], model(ids[:1, PAD:]).logits[0])


def causal(tokens, past=0):
    return torch.ones(tokens, past + tokens, dtype=torch.bool).tril(past)[None, None]


@pytest.mark.parametrize("mixer", [tiny.LOLCATS, tiny.SOFTMAX], ids=["lolcats", "softmax"])
def test_masks_of_later_calls_are_held_against_the_earlier(mixer):
    """Two ends of one prefix in one cache: a state cannot give back what the first end has added."""
    model = surgery.convert(tiny.model("llama", num_hidden_layers=2), mixer)
    ids = tiny.tokens(1, 24)
    for tokens in (8, 1):
        cache = DynamicCache(config=model.config)
        given = {cache_name(model): cache}
        with torch.no_grad():
            model(ids[:, :8], attention_mask=causal(8), **given)
            model(ids[:, 8:12], attention_mask=causal(4, 8), **given)
            model(ids[:, 12:13], **given)
            whole = causal(tokens, 13)
            branch = whole.clone()
            branch[..., 8:12] = False
            with pytest.raises(UnsupportedModelError, match="hides tokens of earlier calls"):
                model(ids[:, 13 : 13 + tokens], attention_mask=branch, **given)
            out = model(ids[:, 13 : 13 + tokens], attention_mask=whole, **given).logits
        close(out, model(ids[:, : 13 + tokens]).logits[:, 13:])


def test_padding_of_earlier_calls_stays_hidden():
    model = surgery.convert(tiny.model("llama", num_hidden_layers=2), tiny.LOLCATS)
    ids, mask, positions = tiny.left_padded(2, 18, PAD)
    given = {cache_name(model): DynamicCache(config=model.config)}
    later = causal(4, 10).expand(2, -1, -1, -1).clone()
    with torch.no_grad():
        model(ids[:, :10], attention_mask=mask[:, :10], position_ids=positions[:, :10], **given)
        with pytest.raises(UnsupportedModelError, match="shows padding"):
            model(ids[:, 10:14], attention_mask=later, position_ids=positions[:, 10:14], **given)
        later[0, ..., :PAD] = False
        out = model(ids[:, 10:14], attention_mask=later, position_ids=positions[:, 10:14], **given).logits
        close(out[0], model(ids[:1, PAD:14]).logits[0, -4:])


@pytest.mark.parametrize("tokens", [6, 1])
@pytest.mark.parametrize("before", [True, False], ids=["padded", "text"])
@pytest.mark.parametrize("later", ["zeros", "ones", "none"])
def test_a_later_mask_of_padding_is_held_against_the_earlier(before, later, tokens):
    """What an earlier call had as padding is not in the state, and what it had as text cannot be taken out."""
    model = surgery.convert(tiny.model("llama", num_hidden_layers=2), tiny.LOLCATS)
    ids, padded, positions = tiny.left_padded(2, 18, PAD)
    end = 10 + tokens
    given = {cache_name(model): DynamicCache(config=model.config)}
    masks = {"zeros": padded[:, :end], "ones": torch.ones_like(padded)[:, :end], "none": None}
    with torch.no_grad():
        model(ids[:, :10], attention_mask=padded[:, :10] if before else None, **given)

        def go_on(mask):
            return model(
                ids[:, 10:end], attention_mask=mask, position_ids=positions[:, 10:end], **given
            ).logits

        fits = before == (later == "zeros")
        if not fits:
            with pytest.raises(
                UnsupportedModelError, match="hides tokens of earlier calls, or shows padding"
            ):
                go_on(masks[later])
        right = go_on(padded[:, :end] if before else masks["ones"])
        if before:
            close(right[0], model(ids[:1, PAD:end]).logits[0, -tokens:])


def test_rows_of_a_cache_keep_their_padding():
    """Rows in another order, rows chosen, and a cache begun anew."""
    model = surgery.convert(tiny.model("llama", num_hidden_layers=2), tiny.LOLCATS)
    ids, mask, positions = tiny.left_padded(2, 18, PAD)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :10], attention_mask=mask[:, :10], **{cache_name(model): cache})
        cache.reorder_cache(torch.tensor([1, 0]))
        flipped = {"attention_mask": mask.flip(0)[:, :12], "position_ids": positions.flip(0)[:, 10:12]}
        out = model(ids.flip(0)[:, 10:12], **flipped, **{cache_name(model): cache}).logits
        close(out[1], model(ids[:1, PAD:12]).logits[0, -2:])
        cache.batch_select_indices(torch.tensor([0]))
        close(model(ids[1:, 12:14], **{cache_name(model): cache}).logits, model(ids[1:, :14]).logits[:, -2:])
        cache.reset()
        close(model(ids, **{cache_name(model): cache}).logits, model(ids).logits)
