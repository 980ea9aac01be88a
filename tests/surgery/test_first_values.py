"""RWKV-7's value residual: the first converted layer's values reach the others, in every way that a model runs."""

from __future__ import annotations

from contextlib import contextmanager

import odd
import pytest
import tiny
import torch
from transformers import StaticCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import linearize
from linearize import export, surgery
from linearize.decode import Decoder
from linearize.errors import UnsupportedModelError
from linearize.surgery import handed_on

RWKV7 = {
    "feature_map": {"name": "identity"},
    "gate": {"name": "rwkv7", "rank": 3},
    "update": {"name": "rwkv7", "rank": 3, "first_values": True, "first_rank": 3},
    "normalizer": {"name": "none"},
}


def made(family="llama", layers="all", mixer=RWKV7, **changes):
    model = surgery.convert(tiny.model(family, **changes), mixer, layers)
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    return model


@contextmanager
def calls(model):
    """Layer -> (its own values, those of the first layer) of each call of a mixer."""
    found, undo = {}, []
    for layer in surgery.converted(model):
        for name in ("chunked", "step"):
            form = getattr(layer.mixer, name)

            def watched(*args, form=form, index=layer.layer_idx, **given):
                found.setdefault(index, []).append((args[2], given.get("first")))
                return form(*args, **given)

            setattr(layer.mixer, name, watched)
            undo.append((layer.mixer, name))
    try:
        yield found
    finally:
        for mixer, name in undo:
            delattr(mixer, name)


@pytest.mark.parametrize("layers", ["all", [1, 3]], ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_layer_gets_those_of_the_first_converted_one(family, layers):
    model = made(family, layers)
    ids = tiny.tokens()
    with calls(model) as found, torch.no_grad():
        model(ids, use_cache=False)
    numbers = sorted(found)
    assert numbers == ([0, 1, 2, 3] if layers == "all" else layers)
    first = found[numbers[0]][0][0]
    for number in numbers:
        torch.testing.assert_close(found[number][0][1], first, rtol=0, atol=0)
    assert not torch.equal(found[numbers[1]][0][0], first)


def test_a_layer_mixes_as_published():
    """The last layer's mixer on values that were mixed by hand, with its own mixing switched off."""
    model = made()
    layer = surgery.converted(model)[3]
    with calls(model) as found, torch.no_grad():
        whole = {}
        hook = layer.register_forward_hook(lambda _, args, given, out: whole.update(given), with_kwargs=True)
        model(tiny.tokens(), use_cache=False)
        hook.remove()
    v, first = found[3][0]
    share = layer.mixer.update.first.share
    gate = (whole["hidden_states"] @ share.down @ share.up.flatten(1)).unflatten(-1, v.shape[2:]) + share.base
    mixed = layer.mixer.update.first(v, first, whole["hidden_states"])
    torch.testing.assert_close(mixed, v + (first - v) * torch.sigmoid(gate))


def test_selected_layers_mix_with_those_that_ask():
    """Layers of another mixer hand nothing on, and get nothing."""
    plain = {**RWKV7, "update": {**RWKV7["update"], "first_values": False}}
    model = surgery.convert(tiny.model(), RWKV7, {"use": {"plain": [0, 3]}}, mixers={"plain": plain})
    assert [layer.linearize_hands for layer in surgery.converted(model)] == [False, True, False, False]
    with calls(model) as found, torch.no_grad():
        model(tiny.tokens(), use_cache=False)
    assert found[0][0][1] is None and found[3][0][1] is None
    torch.testing.assert_close(found[2][0][1], found[1][0][0])


def gradients(model, passes):
    model.zero_grad()
    losses = [model(ids, use_cache=False, labels=ids).loss for ids in passes]
    for loss in losses:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_checkpointing_and_calls_that_interleave():
    """Two calls before the first backward pass: what is computed again sees the values of its own call."""
    model = made().train()
    passes = [tiny.tokens(seed=1), tiny.tokens(seed=2)]
    expected = gradients(model, passes)
    alone = {name: 0 for name in expected}
    for ids in passes:
        alone = {name: alone[name] + g for name, g in gradients(model, [ids]).items()}
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    switch(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
    found = gradients(model, passes)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
        torch.testing.assert_close(alone[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    share = surgery.converted(model)[2].mixer.update.first.share
    assert all(parameter.grad.abs().max() > 0 for parameter in (share.base, share.down, share.up))
    switch(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": True}})
    with pytest.raises(UnsupportedModelError, match="reentrant"):
        gradients(model, passes[:1])


def test_values_carry_gradients_to_the_first_layer():
    model = made()
    projection = surgery.converted(model)[0].v_proj.weight
    for layer in surgery.converted(model)[1:]:
        torch.nn.init.constant_(layer.mixer.update.first.share.base, 50.0)  # all values are the first layer's
    model(tiny.tokens(), use_cache=False).logits.sum().backward()
    assert projection.grad.abs().max() > 0
    assert surgery.converted(model)[2].v_proj.weight.grad.abs().max() == 0


@pytest.mark.parametrize("layers", ["all", [1, 2]], ids=str)
def test_a_cache_in_pieces_gives_the_whole(layers):
    model = made(layers=layers)
    ids = tiny.tokens(length=24)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for cache in (None, StaticCache(config=model.config, max_cache_len=32)):
            parts, past = [], cache
            for first, last in ((0, 10), (10, 11), (11, 12), (12, 20), (20, 24)):
                out = model(ids[:, first:last], past_key_values=past, use_cache=True)
                past = out.past_key_values
                parts.append(out.logits)
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_tokens_are_taken_back_with_them():
    """Assisted decoding crops the cache, and the kept tokens are read again."""
    model = made()
    ids = tiny.tokens(1, 20)
    plain = model.generate(ids, max_new_tokens=12, do_sample=False)
    again = model.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, again)
    helped = model.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=made())
    assert torch.equal(plain, helped)


def test_saved_and_loaded(tmp_path):
    """`check` loads the remote code in a process of its own."""
    model = made(layers=[1, 3])
    export.save(model, tmp_path / "made", check=True)
    loaded = linearize.load(tmp_path / "made")
    ids = tiny.tokens()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert [layer.linearize_hands for layer in surgery.converted(loaded)] == [True, False]


def test_transfer_sees_the_teachers_own():
    """Attention transfer: without a graph, from a first layer that runs as the teacher."""
    model, seen = made(), []
    with surgery.observe(model, seen.append):
        model(tiny.tokens(), use_cache=False)
    assert len(seen) == 4
    for call in seen:
        assert torch.equal(call.context["first"], seen[0].v) and not call.context["first"].requires_grad
        assert call.student().requires_grad


def test_a_first_layer_that_runs_as_the_teacher_hands_on_too():
    model, ids = made(), tiny.tokens()
    with surgery.as_teacher_layers(model, [0]), calls(model) as found, torch.no_grad():
        model(ids, use_cache=False)
    assert sorted(found) == [1, 2, 3]
    own = surgery.converted(model)[0].v_proj
    with torch.no_grad():
        hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
        expected = own(hidden).unflatten(-1, (2, -1))
    torch.testing.assert_close(found[3][0][1], expected)


@pytest.mark.parametrize("layers", ["all", [1, 2]], ids=str)
@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_steps_of_fixed_size_hand_them_on(family, layers):
    """Gemma 3 is given a mask for each kind of layer in them, which no padding is read off."""
    model, ids = made(family, layers), tiny.tokens(2, 12)
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(ids, **options)[:, 12:]
    assert torch.equal(Decoder(model, 2, pad=0, length=24).generate(ids, None, 6), wanted)


def test_refused_by_name():
    model = made()
    block, hidden = model.model.layers[2], torch.randn(1, 5, 32)
    rotation = model.model.rotary_emb(hidden, torch.arange(5)[None])
    with pytest.raises(UnsupportedModelError, match=r"layer 2 .*without `linearize_first_values`"):
        block(hidden, position_embeddings=rotation)
    with pytest.raises(UnsupportedModelError, match=r"layer 2 .*has not run before it"):
        block(hidden, position_embeddings=rotation, linearize_first_values=handed_on.FirstLayer())


def test_values_of_another_shape_are_refused():
    model = made()
    layers = surgery.converted(model)
    layers[2].mixer.shape = linearize.mixers.LayerShape(4, 4, 8, 8, 1.0, model_dim=32)
    with pytest.raises(UnsupportedModelError, match=r"layer 2 .*cannot be mixed"):
        handed_on.mark(layers)


def test_blocks_that_keep_arguments_are_told_without_weights(monkeypatch):
    """As `run` would otherwise find behind the teacher's evaluation."""
    own = LlamaDecoderLayer.forward

    def alone(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        return own(self, hidden_states, attention_mask, position_embeddings=position_embeddings)

    for model in (tiny.config("llama"), tiny.model("llama")):
        surgery.plan(model, RWKV7)
        with monkeypatch.context() as patch:
            patch.setattr(LlamaDecoderLayer, "forward", alone)
            with pytest.raises(
                UnsupportedModelError, match=r"layers\.0\.self_attn .*without `linearize_first_values`"
            ):
                surgery.plan(model, RWKV7)


def test_a_family_that_misnames_its_base_model_looks_too(tmp_path):
    """Llama 4's: it counted padding as text where no positions were given, and had nothing to hand values on by."""
    model = surgery.convert(odd.model("llama4_text"), RWKV7)
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    ids, mask, positions = tiny.left_padded(length=14)
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
        assert torch.equal(model(ids, attention_mask=mask).logits[mask.bool()], wanted)
        linearize.save(model, tmp_path / "out", check=True)
        again = linearize.load(tmp_path / "out")
        assert torch.equal(again(ids, attention_mask=mask).logits[mask.bool()], wanted)


def test_values_of_another_shape_are_told_without_weights():
    sizes = {"num_kv_shared_layers": 0, "global_head_dim": 16}
    config = odd.config("gemma4_text", **sizes)
    said = r"layers\.1\.self_attn \(Gemma4TextAttention\) has 2 heads of 16 values, .*layers\.0.* 2 of 8"
    for model in (config, odd.model("gemma4_text", **sizes)):
        with pytest.raises(UnsupportedModelError, match=said):
            surgery.plan(model, RWKV7)
        surgery.plan(model, RWKV7, [1, 3])
    with pytest.raises(UnsupportedModelError, match=said):
        surgery.convert(odd.model("gemma4_text", **sizes), RWKV7)
