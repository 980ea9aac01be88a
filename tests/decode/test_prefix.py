"""A text read once and gone on from: through a file in another process, in both decodings, and what is refused."""

from __future__ import annotations

import elsewhere
import pytest
import tiny
import torch
from elsewhere import LENGTHS, MIXERS, OTHERS, ids_of, made
from safetensors.torch import load_file
from several import start
from transformers.cache_utils import DynamicCache

from linearize import surgery
from linearize.decode import Decoder, load_state, read_ids, save_state, state_of
from linearize.decode.arguments import cache_name
from linearize.decode.cache import tensors
from linearize.errors import CheckpointError, LinearizeError, UnsupportedModelError

TOLERANCE = 2e-4
"""Of logits read in two pieces beside one, as a share of the largest: the order of sums is another."""
FEW = 6
"""Compositions that CI looks at, beside those of other families; the rest are slow."""


@torch.no_grad()
def pieces(model, first, more):
    """Logits of what follows, read with a cache that has read the first piece and never left the process."""
    cache = DynamicCache(config=model.config)
    model(first, **{cache_name(model): cache})
    return model(more, **{cache_name(model): cache}).logits


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([*OTHERS, *list(MIXERS)[:FEW]], id="few"),
        *(
            pytest.param(list(MIXERS)[first : first + 16], id=f"from {first}", marks=pytest.mark.slow)
            for first in range(FEW, len(MIXERS), 16)
        ),
    ],
)
def test_a_state_from_a_file_is_the_text_read_again(tmp_path, names):
    """Bit for bit where the pieces are the same, and to rounding where the text is read at once."""
    torch.set_num_threads(1)  # as in the other process
    expected = {}
    for name in names:
        model = made(name)
        for length in LENGTHS:
            first, more = ids_of(length)
            save_state(read_ids(model, first), tmp_path / f"{name}-{length}.state")
            expected[f"{name}-{length}"] = pieces(model, first, more)
            with torch.no_grad():
                whole = model(torch.cat([first, more], 1)).logits[:, first.shape[1] :]
            apart = (expected[f"{name}-{length}"] - whole).abs().max() / whole.abs().max()
            assert apart < TOLERANCE, (name, length, MIXERS.get(name), apart)
    ended = start(1, elsewhere.go_on, str(tmp_path), folder=tmp_path)
    assert ended.codes == [0], ended.said
    found = load_file(tmp_path / "logits.safetensors")
    assert set(found) == set(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("name", ["hybrid", "gemma2", "gpt2", "softmax", "terraced", "full"])
def test_both_decodings_go_on_from_it(name):
    """Several rows from one state, again and again, with the tokens that the whole text gives."""
    model = surgery.convert(tiny.model(), tiny.SOFTMAX) if name == "full" else made(name)
    first, more = ids_of("odd")
    whole, state = torch.cat([first, more], 1), read_ids(model, first)
    options = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(whole, **options)[:, whole.shape[1] :]
    again = model.generate(whole, **{cache_name(model): state.cache(model)}, **options)
    assert torch.equal(again[:, whole.shape[1] :], wanted)
    decoder = Decoder(model, 2, pad=0, length=64)
    for _ in range(2):
        rows = decoder.generate(more.expand(2, -1), None, 9, prefix=state)
        assert torch.equal(rows, wanted.expand(2, -1))
        assert torch.equal(decoder.generate(whole.expand(2, -1), None, 9), rows), (
            "nothing of the state is left"
        )


@pytest.mark.parametrize("name", ["hybrid", "gemma2", "terraced"])
def test_the_engine_holds_what_reading_would_have_left(name):
    model = made(name)
    first, _ = ids_of("odd")
    decoder = Decoder(model, 1, length=64)
    decoder.generate(first, None, 1)
    read = {key: x.clone() for key, x in tensors(decoder.cache).items()}
    decoder._reset()
    state = read_ids(model, first)
    for index, layer in enumerate(decoder.cache.layers):
        layer.hold(state.layer(index), state.tokens)
    kept = tensors(decoder.cache)
    apart = [
        key
        for key in kept
        if key.split(".")[1] not in ("keys", "values") and not torch.equal(kept[key], read[key])
    ]
    assert kept and apart == []


@pytest.mark.parametrize("layers", ["all", [0]], ids=["whole", "beside softmax"])
@pytest.mark.parametrize("update", ["mala", "inline"])
def test_a_sum_that_is_called_values_does_not_grow(tmp_path, update, layers):
    """Softmax layers call what grows by that name."""
    mixer = {"feature_map": {"name": "elu"}, "update": {"name": update}, "normalizer": {"name": "none"}}
    model = surgery.convert(tiny.model(num_hidden_layers=2), mixer, layers)
    first, more = ids_of("odd")
    save_state(read_ids(model, first), tmp_path / "state")
    state = load_state(tmp_path / "state", model)
    kept = [] if layers == "all" else [state.tensors["1.keys"], state.tensors["1.values"]]
    assert "0.values" in state.tensors and state.grown == sum(x.numel() * x.element_size() for x in kept)
    with torch.no_grad():
        found = model(more, **{cache_name(model): state.cache(model)}).logits
    assert torch.equal(found, pieces(model, first, more))


def test_one_text_after_another():
    model = made("hybrid")
    first, more = ids_of("odd")
    whole, state = torch.cat([first, more], 1), read_ids(model, first)
    longer = read_ids(model, more, after=state)
    assert (longer.tokens, longer.last) == (whole.shape[1], int(whole[0, -1]))
    assert longer.begins(whole) and state.begins(whole) and not longer.begins(first)
    assert not state.begins(whole[:, 1:])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(whole, **{cache_name(model): cache})
    assert state_of(model, cache, whole).digest == longer.digest
    assert 0 < longer.grown < longer.bytes


def test_what_a_cache_cannot_give():
    model = made("hybrid")
    ids, mask, _ = tiny.left_padded(length=12)
    for rows, given, said in [
        (slice(0, 2), None, "holds 2 texts, and a state holds one"),
        (slice(0, 1), mask[:1], "has read padding"),
    ]:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[rows], attention_mask=given, **{cache_name(model): cache})
        with pytest.raises(LinearizeError, match=said):
            state_of(model, cache, ids[:1])
    with pytest.raises(LinearizeError, match="5 ids for a cache that has read 12 tokens"):
        state_of(model, cache, ids[:1, :5])
    with surgery.mode(model, "teacher"), pytest.raises(LinearizeError, match="run as their teacher"):
        read_ids(model, ids[:1])
    with pytest.raises(LinearizeError, match="no token to read"):
        read_ids(model, [])
    with pytest.raises(LinearizeError, match="unequal length behind a state"):
        Decoder(model, 2, length=64).generate(ids, mask, 3, prefix=read_ids(model, ids[1:]))


def test_a_cache_of_another_kind_is_named():
    from transformers import StaticCache

    model = made("softmax")
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(tiny.tokens(1, 5), **{cache_name(model): cache})
    with pytest.raises(UnsupportedModelError, match="layer 0 holds its past in a StaticLayer"):
        state_of(model, cache, tiny.tokens(1, 5))


def test_another_model_is_refused(tmp_path):
    model = made("hybrid")
    path = save_state(read_ids(model, ids_of("odd")[0]), tmp_path / "a.state")
    assert load_state(path, model).tokens == 21
    with pytest.raises(LinearizeError, match="another model's: its config"):
        load_state(path, made("softmax"))
    with pytest.raises(
        LinearizeError, match=r"read in float32 and this model computes in bfloat16; load it in float"
    ):
        load_state(path, made("hybrid").bfloat16())
    with torch.no_grad():
        next(surgery.converted(model)[0].mixer.parameters()).add_(1)
    with pytest.raises(LinearizeError, match="another model's: its weights"):
        load_state(path).cache(model)


def test_a_file_that_is_no_whole_state_is_refused(tmp_path):
    path = save_state(read_ids(made("hybrid"), ids_of("odd")[0]), tmp_path / "a.state")
    whole = path.read_bytes()
    assert whole.count(b'"format":"1"') == 1
    damaged = {
        "cut short or damaged": [
            whole[:-1],
            whole[: len(whole) // 2],
            whole[:5],
            b"",
            b"PK\x03\x04 a pickle",
        ],
        "not those that were written": [
            whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:],
            whole.replace(b'\\"tokens\\": 21', b'\\"tokens\\": 22'),
        ],
        "of format 9, written by a newer linearize": [whole.replace(b'"format":"1"', b'"format":"9"')],
    }
    for said, contents in damaged.items():
        for content in contents:
            assert content != whole
            path.write_bytes(content)
            with pytest.raises(CheckpointError, match=said):
                load_state(path)
    for other, said in [(tmp_path, "is a folder"), (tmp_path / "no", "does not exist")]:
        with pytest.raises(CheckpointError, match=said):
            load_state(other)


def test_nothing_else_is_lost_by_writing(tmp_path):
    state, path = read_ids(made("gpt2"), ids_of("short")[0]), tmp_path / "doc.txt"
    path.write_text("a long document")
    with pytest.raises(CheckpointError, match="a file that is no state, which would be lost"):
        save_state(state, path)
    assert path.read_text() == "a long document"
    with pytest.raises(CheckpointError, match="there is no folder"):
        save_state(state, tmp_path / "no" / "a.state")
    for _ in range(2):
        save_state(state, tmp_path / "a.state")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.state", "doc.txt"]


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gpt2", {"n_positions": 16}, "more than the model's 16 learned positions"),
        (
            "llama",
            {
                "max_position_embeddings": 16,
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            },
            "RoPE 'dynamic', which rotates all of them otherwise beyond 16",
        ),
    ],
    ids=["learned", "dynamic"],
)
def test_positions_that_do_not_reach(family, changes, said):
    model = tiny.model(family, **changes)
    assert read_ids(model, tiny.tokens(1, 16)).tokens == 16
    with pytest.raises(LinearizeError, match=said):
        read_ids(model, tiny.tokens(1, 17))
