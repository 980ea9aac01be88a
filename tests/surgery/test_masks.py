"""A row of a padded batch is the row alone, however it is fed; masks that no state can obey are refused by name."""

from __future__ import annotations

import inspect

import pytest
import tiny
import torch
from compositions import small
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    eager_mask,
    flash_attention_mask,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from linearize import surgery
from linearize.config import compose
from linearize.errors import LinearizeError, UnsupportedModelError
from linearize.surgery.masks import read_mask

FAMILIES = ("llama", "gemma3", "gpt2")
RECIPES = (
    "lolcats", "hedgehog", "t2r", "based", "radlads_rwkv7", "lawcat", "lolcats_terraced", "swa_sinks", "liger_gla",
    "lizard",
)  # fmt: skip
LOWEST = torch.finfo(torch.float32).min
PAD, LENGTH = 6, 22
SMALL = {
    "llama": {"num_hidden_layers": 2},
    "gemma3": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"n_layer": 2},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp(family)
        tiny.model(family, **SMALL[family]).save_pretrained(made[family])
    return made


def student(folder, mixer):
    model = surgery.convert(AutoModelForCausalLM.from_pretrained(folder).eval(), mixer)
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    return model


def close(out, expected):
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(out, expected, atol=1e-5 * scale, rtol=0)


def cached(model, cache, **given):
    # the first name is that of transformers 5.24, the second the one before it
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return model(**given, **{name: cache}).logits


def fed(model, ids, mask, positions, pieces, cache=None):
    """Logits [B, T, V] of calls of so many tokens each."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    outs, end = [], 0
    with torch.no_grad():
        for piece in pieces:
            first, end = end, end + piece
            given = {"input_ids": ids[:, first:end], "position_ids": positions[:, first:end]}
            outs.append(cached(model, cache, attention_mask=mask[:, :end], **given))
    assert end == ids.shape[1]
    return torch.cat(outs, 1)


QUICK = ("lolcats", "radlads_rwkv7", "lawcat", "lolcats_terraced")
"""Recipes that are tried in every family each time; the others in one."""
PAIRS = [
    pytest.param(family, recipe, marks=[] if family == "llama" or recipe in QUICK else pytest.mark.slow)
    for family in FAMILIES
    for recipe in RECIPES
]


@pytest.mark.parametrize(("family", "recipe"), PAIRS)
def test_a_padded_row_is_the_row_alone(folders, family, recipe):
    model = student(folders[family], small(compose(recipe, []).mixer))
    ids, mask, positions = tiny.left_padded(2, LENGTH, PAD)
    with torch.no_grad():
        alone = model(ids[:1, PAD:]).logits[0], model(ids[1:]).logits[0]
        outs = [model(ids, attention_mask=mask, position_ids=positions).logits]
    for pieces in ([1] * LENGTH, [2, 5, 1, 1, 13]):
        outs.append(fed(model, ids, mask, positions, pieces))
    for out in outs:
        close(out[0, PAD:], alone[0])
        close(out[1], alone[1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", ["lolcats", "lawcat", "lolcats_terraced", "swa_sinks"])
def test_a_second_turn_behind_padding_is_the_row_alone(folders, family, recipe):
    """[pad a b c | pad pad d e]: a batched chat goes on, and its shorter rows have padding in the middle."""
    model = student(folders[family], small(compose(recipe, []).mixer))
    ids, mask = tiny.tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, :2], mask[0, 9:15], mask[1, 8:10] = 0, 0, 0
    positions, text = (mask.cumsum(1) - 1).clamp_min(0), mask.bool()
    with torch.no_grad():
        alone = [model(ids[row : row + 1, text[row]]).logits[0] for row in (0, 1)]
        outs = [model(ids, attention_mask=mask, position_ids=positions).logits]
    outs.append(fed(model, ids, mask, positions, [12, 1, 4, 1, 4]))
    cache = StaticCache(config=model.config, max_cache_len=40)
    outs.append(fed(model, ids, mask, positions, [8] + [1] * 6 + [8], cache))
    for out in outs:
        for row in (0, 1):
            close(out[row, text[row]], alone[row])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", ["all", [1]], ids=str)
def test_static_caches_and_every_kind_of_mask(folders, family, implementation, layers):
    model = AutoModelForCausalLM.from_pretrained(folders[family], attn_implementation=implementation).eval()
    surgery.convert(model, tiny.LOLCATS, layers)
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    ids, mask, positions = tiny.left_padded(2, LENGTH, PAD)
    with torch.no_grad():
        alone = model(ids[:1, PAD:]).logits[0]
    for pieces in ([1] * LENGTH, [2, 5, 1, 14]):
        cache = StaticCache(config=model.config, max_cache_len=40)
        close(fed(model, ids, mask, positions, pieces, cache)[0, PAD:], alone)
        close(fed(model, ids, mask, positions, pieces)[0, PAD:], alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_in_chunks_of_any_size(folders, family):
    model = student(folders[family], tiny.LOLCATS)
    ids, mask, _ = tiny.left_padded(2, 20, 7)
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **settings)
    for size in (1, 3, 8):
        assert torch.equal(model.generate(ids, prefill_chunk_size=size, **settings), expected)
    how = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(ids, prefill_chunk_size=1, **how, **settings), expected)


def test_a_mask_is_checked_once_for_all_layers(monkeypatch):
    from linearize.surgery import masks

    model, checked = surgery.convert(tiny.model("gemma3", **SMALL["gemma3"]), tiny.LOLCATS), []
    own = masks._checked
    monkeypatch.setattr(masks, "_checked", lambda *given: checked.append(given) or own(*given))
    ids, mask, positions = tiny.left_padded()
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions)
    assert len(checked) == 2, "one for the layers that slide and one for the others"


CAUSAL = torch.ones(24, 24, dtype=torch.bool).tril()
DOCUMENTS = CAUSAL.clone()
DOCUMENTS[10:, :10] = False
TREE = CAUSAL.clone()
TREE[16:, 8:16] = False
PREFIX = CAUSAL.clone()
PREFIX[:6, :6] = True
STRICT = torch.ones(24, 24, dtype=torch.bool).tril(-1)
BAND = CAUSAL & ~torch.ones(24, 24, dtype=torch.bool).tril(-7)
HOLE = CAUSAL.clone()
HOLE[20:, 4] = False


def added(seen, low):
    return torch.zeros(seen.shape).masked_fill(~seen, low)


@pytest.mark.parametrize("low", [None, -1e4, -1e9, LOWEST, -torch.inf], ids=str)
def test_packed_documents_as_a_mask(low):
    model = surgery.convert(tiny.model("llama"), tiny.LAWCAT)
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    ids, positions = tiny.tokens(2, 24), torch.cat([torch.arange(10), torch.arange(14)])[None]
    mask = DOCUMENTS[None, None] if low is None else added(DOCUMENTS, low)[None, None]
    with torch.no_grad():
        for rows in (1, 2):
            out = model(ids, attention_mask=mask.expand(rows, -1, -1, -1), position_ids=positions).logits
            close(out[:, :10], model(ids[:, :10]).logits)
            close(out[:, 10:], model(ids[:, 10:]).logits)
        # a document that ends in padding, and another behind it
        gap = DOCUMENTS.clone()
        gap[:, 8:10] = False
        mask = gap[None, None] if low is None else added(gap, low)[None, None]
        out = model(ids, attention_mask=mask, position_ids=positions).logits
        close(out[:, :8], model(ids[:, :8]).logits)
        close(out[:, 10:], model(ids[:, 10:]).logits)


@pytest.mark.parametrize("low", [None, -1e4, -1e9, LOWEST, -torch.inf], ids=str)
@pytest.mark.parametrize(
    "seen", [TREE, PREFIX, STRICT, BAND, HOLE, torch.ones_like(CAUSAL)],
    ids=["tree", "prefix", "strict", "band", "hole", "both directions"],
)  # fmt: skip
def test_masks_that_no_state_can_obey_are_refused(seen, low):
    model = surgery.convert(tiny.model("llama"), tiny.LOLCATS)
    mask = seen[None, None] if low is None else added(seen, low)[None, None]
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="shared prefix, a tree"):
        model(tiny.tokens(2, 24), attention_mask=mask)


def heads(mask):
    mask = mask[None, None].repeat(2, 4, 1, 1)
    mask[:, 2, 20:, 3] = -1e9
    return mask


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (heads(added(CAUSAL, LOWEST)), "from head to head"),
        (added(CAUSAL, LOWEST)[None, None] - 0.5 * CAUSAL, "which weigh keys"),
        (added(CAUSAL, LOWEST)[None, None] * torch.nan, "which weigh keys"),
        (CAUSAL.long()[None, None], "true where a key is seen"),
        (CAUSAL[None, None, :7], "a mask of shape|attention mask of shape"),
        (CAUSAL[None], "attention mask of shape"),
        (torch.ones(1, 1, 1, 24, dtype=torch.bool), "shared prefix, a tree"),
    ],
    ids=["heads", "weights", "nan", "integers", "rows", "three dimensions", "keys alone"],
)
def test_other_masks_are_refused_by_name(mask, message):
    layer = surgery.converted(surgery.convert(tiny.model("llama"), tiny.LOLCATS))[0]
    rotation = torch.ones(1, 24, 8), torch.zeros(1, 24, 8)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=message):
        layer(torch.randn(2, 24, 32), attention_mask=mask, position_embeddings=rotation)


@pytest.mark.parametrize(
    "shape", [(24,), (3, 24), (2, 24, 24), (2, 1, 1, 24, 24)], ids=lambda shape: f"{len(shape)} dimensions"
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_masks_of_a_shape_that_nobody_reads_are_refused_by_the_model(shape, dtype):
    model = surgery.convert(tiny.model("llama"), tiny.LOLCATS)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="for 2 rows of 24 tokens; give"):
        model(tiny.tokens(2, 24), attention_mask=torch.ones(shape, dtype=dtype))


def test_a_call_that_does_not_fit_its_cache_is_refused():
    model = surgery.convert(tiny.model("llama"), tiny.LOLCATS)
    ids, cache = tiny.tokens(2, 12), DynamicCache(config=model.config)
    with torch.no_grad():
        with pytest.raises(LinearizeError, match="no token to read: give"):
            model(ids[:, :0])
        model(ids, past_key_values=cache)
        with pytest.raises(LinearizeError, match="no token to read behind the 12 that the cache holds"):
            model.generate(ids[:, :5], past_key_values=cache, max_new_tokens=3, do_sample=False)
        with pytest.raises(LinearizeError, match="the states of 2 texts, and 1 are given"):
            model(ids[:1], past_key_values=cache)
        cache.batch_select_indices(torch.tensor([1]))
        rest = model(ids[1:, :4], past_key_values=cache).logits
        close(rest, model(torch.cat([ids[1:], ids[1:, :4]], 1)).logits[:, 12:])


def test_a_mask_wider_than_the_teachers_window_is_refused():
    """One causal mask for all layers: the untouched model forgets its sliding windows under it."""
    model = surgery.convert(tiny.model("gemma3"), tiny.LOLCATS)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="inside this layer's window of 9"):
        model(tiny.tokens(2, 24), attention_mask=CAUSAL[None, None])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("make", [sdpa_mask, eager_mask])
@pytest.mark.parametrize(
    ("tokens", "seen", "width"), [(9, 0, 9), (9, 0, 20), (4, 6, 10), (4, 6, 20), (1, 6, 7), (3, 5, 8)]
)
def test_what_transformers_makes_is_read(make, window, tokens, seen, width):
    """Padding in front and in the middle, in rows that begin or go on, with keys that are yet to come."""
    own = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    padding = torch.ones(3, seen + tokens, dtype=torch.bool)
    padding[0, :3], padding[1, :7], padding[2, 4:6] = False, False, False
    for padded in (padding, padding[:1], None):
        rows = 3 if padded is None else len(padded)
        mask = make(batch_size=rows, q_length=tokens, kv_length=width, q_offset=seen, mask_function=own,
                    attention_mask=padded, allow_is_causal_skip=False)  # fmt: skip
        found = read_mask(mask, rows, tokens, seen, window=window, carries=True)
        expected = torch.ones(rows, tokens, dtype=torch.bool) if padded is None else padded[:, seen:]
        assert torch.equal(found.valid, expected)
        place = read_mask(mask, rows, tokens, torch.tensor(seen), window=window, carries=True)
        assert torch.equal(place.valid, expected)
        if found.starts is not None and window is None:
            behind = (
                torch.zeros_like(found.starts)
                if padded is None
                else found.starts & padded[:, :seen].any(1)[:, None]
            )
            assert not behind.any(), "padding is no border of a document"


def test_chunked_attention_is_read_as_documents():
    mask = sdpa_mask(batch_size=2, q_length=9, kv_length=9, allow_is_causal_skip=False,
                     mask_function=chunked_causal_mask_function(4, torch.tensor([0, 1])))  # fmt: skip
    starts = read_mask(mask, 2, 9).starts
    assert starts.nonzero().tolist() == [[0, 4], [0, 8], [1, 1], [1, 5]]


def test_rows_that_see_everything_are_padding():
    """Masks that open the rows of padding, lest a softmax be empty."""
    seen = CAUSAL.clone()
    seen[:, :5] = False
    seen[:5] = True
    found = read_mask(added(seen, LOWEST)[None, None], 2, 24)
    assert found.valid.tolist() == [[False] * 5 + [True] * 19] * 2
    assert not found.starts.any()


def test_two_dimensions_are_padding():
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 1, 1]], dtype=torch.bool)
    mask = flash_attention_mask(2, 3, 5, attention_mask=padding)
    assert torch.equal(read_mask(mask, 2, 3, 2).valid, padding[:, 2:])
    assert torch.equal(read_mask(mask, 2, 1, 4).valid, padding[:, 4:])
    assert [read_mask(padding[row : row + 1], 1, 5).gaps for row in (0, 1)] == [False, True]


def test_masks_are_read_under_inference_mode():
    model = student_of("llama")
    ids, mask, positions = tiny.left_padded()
    with torch.inference_mode():
        inside = model(ids, attention_mask=mask, position_ids=positions).logits
    with torch.no_grad():
        assert torch.equal(inside, model(ids, attention_mask=mask, position_ids=positions).logits)


def student_of(family):
    model = surgery.convert(tiny.model(family), tiny.LOLCATS)
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    return model
