"""Generation: greedy, sampled, beams, padding, turns, static and assisted; and the cache that does not grow."""

from __future__ import annotations

import copy
import inspect

import odd
import pytest
import tiny
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.generation.continuous_batching import PagedAttentionCache

from linearize import surgery
from linearize.errors import LinearizeError, UnsupportedModelError

families = pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
layers = pytest.mark.parametrize("layers", ["all", [1, 2]], ids=str)


def hybrid(family: str = "llama", layers="all", mixer=tiny.LOLCATS):
    model = surgery.convert(tiny.model(family), mixer, layers)
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    return model


SETTINGS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "several": {"num_return_sequences": 3, "do_sample": True},
    "several-beams": {"num_beams": 4, "num_return_sequences": 2},
}


def beside_llama(names, quick) -> pytest.MarkDecorator:
    """Everything with a Llama; of another family what a cache does, beside layers that stay: the rest is slow."""
    return pytest.mark.parametrize(
        ("family", "layers", "name"),
        [
            pytest.param(family, layers, name, marks=marks)
            for name in names
            for layers in ("all", [1, 2])
            for family in ("llama", "gemma3", "gpt2")
            for marks in (
                [] if family == "llama" or (layers != "all" and name in quick) else [pytest.mark.slow],
            )
        ],
        ids=str,
    )


@beside_llama(SETTINGS, quick=("greedy", "several-beams"))
def test_cached_generation_equals_uncached(family, layers, name):
    settings = SETTINGS[name]
    model = hybrid(family, layers)
    ids, mask, _ = tiny.left_padded(length=20)
    outs = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        arguments = {"do_sample": False, **settings, "max_new_tokens": 16, "use_cache": use_cache}
        outs.append(model.generate(ids, attention_mask=mask, **arguments))
    assert torch.equal(*outs)


@families
@layers
def test_static_cache(family, layers):
    model = hybrid(family, layers)
    ids, mask, _ = tiny.left_padded(length=20)
    settings = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **settings)
    assert torch.equal(static, model.generate(ids, **settings))


@pytest.mark.parametrize("layers", ["all", [1]], ids=str)
def test_a_static_cache_compiles(layers):
    """What transformers does by itself on a GPU: the one-token forward in one piece, compiled once for all tokens."""
    model = surgery.convert(tiny.model("llama", num_hidden_layers=2), tiny.HEDGEHOG, layers)
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    ids, mask, _ = tiny.left_padded(length=20)
    settings = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
    how = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    how._compile_all_devices = True
    torch._dynamo.reset()
    counters.clear()
    static = model.generate(ids, cache_implementation="static", compile_config=how, **settings)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(static, model.generate(ids, **settings))


@pytest.mark.parametrize("mixer", [tiny.LOLCATS, tiny.SOFTMAX], ids=["lolcats", "grows"])
def test_a_static_cache_without_padding(mixer):
    """Kept layers must not see keys that are yet to come, though no mask says so."""
    model = hybrid("llama", [1], mixer)
    ids = tiny.tokens(1, 8)
    cache = StaticCache(config=model.config, max_cache_len=32)
    settings = {"max_new_tokens": 8, "do_sample": False}
    # the first name is that of transformers 5.24, the second the one before it
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    made = model.generate(ids, **{name: cache}, disable_compile=True, **settings)
    assert torch.equal(made, model.generate(ids, **settings))


@beside_llama(["lolcats", "lawcat"], quick=("lolcats",))
def test_assisted_generation_takes_tokens_back(family, layers, name):
    mixer = {"lolcats": tiny.LOLCATS, "lawcat": tiny.LAWCAT}[name]
    model, assistant = hybrid(family, layers, mixer), hybrid(family, layers, mixer)
    tiny.randomize((layer.mixer for layer in surgery.converted(assistant)), seed=3)
    ids, settings = tiny.tokens(1, 20), {"max_new_tokens": 24, "do_sample": False}
    expected = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, **settings, prompt_lookup_num_tokens=3), expected)
    if family == "gemma3" and layers != "all" and transformers_drafts_wrong():
        with pytest.raises(UnsupportedModelError, match="prompt_lookup_num_tokens"):
            model.generate(ids, **settings, assistant_model=assistant)
    else:
        assert torch.equal(model.generate(ids, **settings, assistant_model=assistant), expected)


def transformers_drafts_wrong() -> bool:
    """Whether an untouched model with sliding layers cannot draft either: transformers 5.17."""
    model, assistant = tiny.model("gemma3"), tiny.model("gemma3")
    for parameter in assistant.parameters():  # some drafts are taken, some are not
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    try:
        model.generate(tiny.tokens(1, 20), max_new_tokens=24, do_sample=False, assistant_model=assistant)
    except RuntimeError:
        return True
    return False


@layers
def test_several_turns_reuse_the_cache(layers):
    model = hybrid("llama", layers)
    first, second = tiny.tokens(1, 20), tiny.tokens(1, 9, seed=4)
    cache = DynamicCache(config=model.config)
    turn = model.generate(first, past_key_values=cache, max_new_tokens=10, do_sample=False)
    both = torch.cat([turn, second], 1)
    again = model.generate(both, past_key_values=cache, max_new_tokens=10, do_sample=False)
    assert torch.equal(again, model.generate(both, max_new_tokens=10, do_sample=False))


def cache_bytes(model, length: int) -> int:
    ids = tiny.tokens(1, length)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    assert cache.get_seq_length() == length
    states = sum(layer.state.bytes for layer in cache.layers)
    # nothing else may hold on to keys: whatever tensors a layer keeps count
    others = [x for layer in cache.layers for x in vars(layer).values() if isinstance(x, torch.Tensor)]
    return states + sum(x.numel() * x.element_size() for x in others)


@pytest.mark.parametrize(
    "mixer", [tiny.LOLCATS, tiny.HEDGEHOG, tiny.LAWCAT], ids=["lolcats", "hedgehog", "lawcat"]
)
def test_cache_does_not_grow(mixer):
    model = surgery.convert(tiny.model("llama", max_position_embeddings=8192), mixer)
    assert cache_bytes(model, 64) == cache_bytes(model, 4096)


def test_softmax_cache_does_grow():
    model = surgery.convert(tiny.model("llama"), tiny.SOFTMAX)
    assert cache_bytes(model, 256) == 4 * cache_bytes(model, 64)


def test_taking_back_more_than_recorded_is_refused():
    model = hybrid()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tiny.tokens(1, 10), past_key_values=cache)
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            cache.crop(-3)


def test_a_cache_of_the_softmax_model_is_refused():
    teacher = tiny.model("llama")
    with torch.no_grad():
        cache = teacher(tiny.tokens(1, 10), use_cache=True).past_key_values
        with pytest.raises(LinearizeError, match="filled by softmax attention"):
            hybrid()(tiny.tokens(1, 1), past_key_values=cache)


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_cache_of_the_student_is_refused_by_others(tokens):
    model, ids = hybrid(), tiny.tokens(1, 14)
    teacher, other = tiny.model("llama"), surgery.convert(tiny.model("llama"), tiny.LAWCAT)
    with torch.no_grad():
        cache = model(ids[:, :10], use_cache=True).past_key_values
        new = {"input_ids": ids[:, 10 : 10 + tokens], "past_key_values": cache}
        with pytest.raises(LinearizeError, match="filled by a converted layer"):
            teacher(**new)
        with (
            surgery.mode(model, "teacher"),
            pytest.raises(LinearizeError, match="filled by a converted layer"),
        ):
            model(**new)
        with pytest.raises(LinearizeError, match="another converted model"):
            other(**{**new, "past_key_values": copy.deepcopy(cache)})
        copied = {**new, "past_key_values": copy.deepcopy(cache)}
        expected = model(ids[:, : 10 + tokens]).logits[:, 10:]
        for out in (copy.deepcopy(model)(**copied).logits, model(**new).logits):
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_continuous_batching_is_refused():
    model = hybrid()
    with pytest.raises(UnsupportedModelError, match="generate_batch"):
        model.generate_batch([[3, 4, 5]])


def test_a_paged_cache_is_refused_and_none_is_no_cache():
    """`cache` holds pages under continuous batching; from transformers 5.24 on also the ordinary cache, or None."""
    layer = surgery.converted(hybrid())[0]
    hidden, rotation = torch.randn(1, 4, 32), (torch.ones(1, 4, 8), torch.zeros(1, 4, 8))
    given = {"position_embeddings": rotation, "attention_mask": None}
    expected = layer(hidden, **given)[0]
    assert torch.equal(layer(hidden, **given, cache=None)[0], expected)
    pages = PagedAttentionCache.__new__(PagedAttentionCache)
    with pytest.raises(UnsupportedModelError, match="generate_batch"):
        layer(hidden, **given, cache=pages, block_table=None)
    with pytest.raises(UnsupportedModelError, match="generate_batch"):
        layer(hidden, **given, block_table=torch.zeros(1, 1, dtype=torch.int32))


def test_reset_and_reuse():
    model = hybrid()
    ids = tiny.tokens(2, 12)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(ids, past_key_values=cache).logits
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(model(ids, past_key_values=cache).logits, expected)


def test_deepcopy_is_independent():
    model = hybrid()
    other = copy.deepcopy(model)
    with surgery.mode(other, "teacher"):
        assert surgery.converted(model)[0].linearize_switch.mode == "student"
    ids = tiny.tokens()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, other(ids).logits)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    "mixer", [tiny.LOLCATS, tiny.LAWCAT, tiny.SOFTMAX], ids=["lolcats", "lawcat", "softmax"]
)
def test_a_cache_made_in_inference_mode_goes_on_outside(mixer, static):
    """Servers prefill under `inference_mode` and decode elsewhere; tensors made inside refuse to be written outside."""
    model = hybrid("llama", "all", mixer)
    ids = tiny.tokens(2, 24)
    with torch.no_grad():
        expected = model(ids).logits
    with torch.inference_mode():
        cache = StaticCache(model.config, max_cache_len=32) if static else DynamicCache(config=model.config)
        outs = [model(ids[:, :20], past_key_values=cache, use_cache=True).logits]
    for t in range(20, 24):
        with torch.no_grad() if t % 2 else torch.inference_mode():
            outs.append(model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat([out.clone() for out in outs], 1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["falcon_h1", "zaya", "bamba", "lfm2"])
@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str
)
def test_hybrids_keep_the_states_of_their_other_layers(family, settings):
    """A cache layer may also hold a convolution's states, which beams reorder with the rest."""
    model = surgery.convert(odd.model(family), tiny.LOLCATS)
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    ids, mask, _ = tiny.left_padded(length=20)
    outs = []
    for use_cache in (True, False):
        arguments = {"do_sample": False, "eos_token_id": None, **settings, "use_cache": use_cache}
        outs.append(model.generate(ids, attention_mask=mask, max_new_tokens=10, **arguments))
    assert torch.equal(*outs)


@pytest.mark.parametrize("family", ["falcon_h1", "zaya", "lfm2"])
def test_hybrid_caches_are_reset_repeated_and_cut(family):
    model = surgery.convert(odd.model(family), tiny.LOLCATS)
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    ids = tiny.tokens(2, 12)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(ids, past_key_values=cache).logits
        cache.reset()
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, expected)
        own = [layer for layer in cache.layers if isinstance(layer, surgery.cache.LinearizedCacheLayer)]
        for layer in own:
            layer.batch_repeat_interleave(2)
            layer.batch_select_indices(torch.tensor([0, 2]))
        if len(own) == len(cache.layers):
            after = model(ids[:, :1], past_key_values=cache).logits
            whole = model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
            torch.testing.assert_close(after, whole, atol=1e-4, rtol=1e-4)
