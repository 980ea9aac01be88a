"""The proof of generic surgery, in every family: a mixer of softmax reproduces the untouched model.

And the hybrid's cached, padded and packed forms agree with its plain forward.
"""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

from linearize import surgery

families = pytest.mark.parametrize("family", tiny.FAMILIES)
TOLERANCE = 1e-5


def close(out, expected):
    """Equal to 1e-5 of the largest logit, or of one if that is smaller."""
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(out, expected, atol=TOLERANCE * scale, rtol=0)


@families
def test_identity_surgery_reproduces_logits(family):
    model = tiny.model(family)
    ids, mask, positions = tiny.left_padded()
    packed = torch.cat([torch.arange(15), torch.arange(25)]).expand(2, -1)
    with torch.no_grad():
        plain = model(ids).logits
        padded = model(ids, attention_mask=mask, position_ids=positions).logits
        documents = model(ids, position_ids=packed, use_cache=False).logits
    swapped = surgery.convert(copy.deepcopy(model), tiny.SOFTMAX)
    assert len(surgery.converted(swapped)) == 4
    assert isinstance(swapped, type(model))
    with torch.no_grad():
        torch.testing.assert_close(swapped(ids).logits, plain, atol=TOLERANCE, rtol=0)
        out = swapped(ids, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(out[mask.bool()], padded[mask.bool()], atol=TOLERANCE, rtol=0)
        out = swapped(ids, position_ids=packed, use_cache=False).logits
        torch.testing.assert_close(out, documents, atol=TOLERANCE, rtol=0)


@families
def test_identity_surgery_reproduces_cached_generation(family):
    model = tiny.model(family)
    ids, mask, _ = tiny.left_padded(length=20)
    settings = {
        "max_new_tokens": 12,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    expected = model.generate(ids, attention_mask=mask, **settings)
    swapped = surgery.convert(copy.deepcopy(model), tiny.SOFTMAX)
    out = swapped.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(out.sequences, expected.sequences)
    for ours, theirs in zip(out.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@families
@pytest.mark.parametrize("layers", ["all", [1, 3]], ids=str)
def test_teacher_mode_is_bit_equal(family, layers):
    model = tiny.model(family)
    ids = tiny.tokens()
    swapped = surgery.convert(copy.deepcopy(model), tiny.LOLCATS, layers)
    with torch.no_grad(), surgery.mode(swapped, "teacher"):
        assert torch.equal(swapped(ids).logits, model(ids).logits)
        settings = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(swapped.generate(ids, **settings), model.generate(ids, **settings))


@families
@pytest.mark.parametrize(
    ("mixer", "layers"),
    [(tiny.LOLCATS, "all"), (tiny.LOLCATS, [0, 2]), (tiny.LAWCAT, [0, 1, 3])],
    ids=["lolcats", "lolcats-some", "lawcat-some"],
)
def test_forms_agree_in_the_model(family, mixer, layers):
    model = surgery.convert(tiny.model(family), mixer, layers)
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    ids, mask, positions = tiny.left_padded()
    with torch.no_grad():
        full = model(ids, attention_mask=mask, position_ids=positions).logits
        alone = model(ids[:1, 7:]).logits
        close(full[:1, 7:], alone)
        step = model(ids[:, :25], attention_mask=mask[:, :25], position_ids=positions[:, :25], use_cache=True)
        cached = [step.logits]
        for t in range(25, 40):
            step = model(
                ids[:, t : t + 1],
                attention_mask=mask[:, : t + 1],
                position_ids=positions[:, t : t + 1],
                past_key_values=step.past_key_values,
                use_cache=True,
            )
            cached.append(step.logits)
        close(torch.cat(cached, 1)[mask.bool()], full[mask.bool()])
        packed = torch.cat([torch.arange(15), torch.arange(25)]).expand(2, -1)
        documents = model(ids, position_ids=packed, use_cache=False).logits
        close(documents[:, 15:], model(ids[:, 15:]).logits)


@families
def test_projections_are_told_apart(family):
    model = surgery.convert(tiny.model(family), tiny.LOLCATS)
    names = surgery.role_modules(model)
    fused = family in ("phi3", "gpt2", "gpt_neox")
    assert len(names) == 4 * (2 if fused else 4)
    (output,) = surgery.projections(surgery.converted(model)[0])["o"]
    assert output in ("o_proj", "c_proj", "dense")


@families
def test_plan_loads_no_weights(family):
    plan = surgery.plan(tiny.config(family), tiny.LOLCATS, [1, 2])
    assert [row.kind for row in plan.rows] == ["softmax", "mixer", "mixer", "softmax"]
    model = surgery.convert(tiny.model(family), tiny.LOLCATS, [1, 2])
    assert plan.parameters == sum(layer.mixer.added_parameters for layer in surgery.converted(model))


@families
def test_rotating_back_gives_the_model_without_rotation(family):
    """A softmax over q and k before RoPE is the same model with its rotary embedding switched off."""
    model = tiny.model(family)
    mixer = {"window": {"name": "full"}, "position": {"name": "rope", "window": False}}
    swapped = surgery.convert(copy.deepcopy(model), mixer)
    ids = tiny.tokens()
    base = model.base_model
    rotary = getattr(base, "rotary_emb", None)
    with torch.no_grad():
        if rotary is not None:
            changed = (model(ids).logits - swapped(ids).logits).abs().max()
            assert changed > 1e-3, "the rotation must matter here, or this test could not fail"
            forward = rotary.forward

            def still(*args, **kwargs):
                cos, sin = forward(*args, **kwargs)
                return torch.ones_like(cos), torch.zeros_like(sin)

            rotary.forward = still
        expected = model(ids).logits
        torch.testing.assert_close(swapped(ids).logits, expected, atol=2e-5, rtol=0)
