"""A state's file that is whole and not what this model would hold: refused by name, whatever its checksum says."""

from __future__ import annotations

import json
from dataclasses import replace

import covering
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers.cache_utils import DynamicCache

from linearize import memory, surgery
from linearize.bench.subjects import mixers_of
from linearize.config import list_recipes
from linearize.config.variants import sections
from linearize.decode import load_state, read_ids, save_state, state_of
from linearize.decode.arguments import cache_name
from linearize.decode.continuation import behind
from linearize.decode.held import COUNTERS, RING, split
from linearize.decode.identity import checksum
from linearize.decode.prefix import Prefix
from linearize.decode.prefix_file import _metadata
from linearize.errors import CheckpointError, LinearizeError

HYBRID = ([1, 2], tiny.LOLCATS)


def hybrid():
    """gemma2: softmax over all, softmax in a window, and converted layers."""
    return surgery.convert(tiny.model("gemma2"), HYBRID[1], HYBRID[0])


def forged(path, tensors=None, **facts):
    """A state's file with other tensors or facts, and the checksum that they ought to have."""
    metadata, old = _metadata(path), load_file(path)
    tensors = old if tensors is None else tensors(old)
    facts = {**json.loads(metadata["facts"]), **facts}
    summed = checksum(tensors, facts)
    save_file(tensors, path, {**metadata, "facts": json.dumps(facts, sort_keys=True), "checksum": summed})
    return path


@pytest.fixture(scope="module")
def model():
    return hybrid()


@pytest.fixture
def path(model, tmp_path):
    return save_state(read_ids(model, tiny.tokens(1, 21)), tmp_path / "a.state")


def changed(part, change):
    def all_of(tensors):
        name = next(name for name in sorted(tensors) if name.endswith(part))
        return {**tensors, name: change(tensors[name]).contiguous()}

    return all_of


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (changed("1.sums", lambda x: x[..., :-1]), r"the state's '1\.sums' is torch.float32 \[1, .*this model holds"),
        (changed("1.sums", lambda x: x.half()), r"'1\.sums' is torch.float16"),
        (changed("1.sums", lambda x: x[0]), r"'1\.sums' is torch.float32 \["),
        (changed(".window_next", lambda x: x.float()), r"\.window_next' is torch.float32"),
        (changed(".window_next", lambda x: x - 22), r"\.window_next' counts -\d+ to -\d+, which is beyond"),
        (changed(".window_next", lambda x: x + 2**40), r"\.window_next' counts 1,0"),
        (changed("0.keys", lambda x: x[:, :, :-1]), r"'0\.keys' is torch.float32 \[1, .*after 21 tokens"),
        (changed("0.values", lambda x: x.expand(3, -1, -1, -1)), r"'0\.values' is torch.float32 \[3,"),
        (lambda held: {k: x for k, x in held.items() if k != "0.keys"}, r"lacks '0\.keys'"),
        (lambda held: {**held, "0.more": torch.zeros(1)}, r"holds '0\.more', which none"),
        (lambda held: {**held, "99.keys": torch.zeros(1)}, r"holds '99\.keys', which none"),
    ],
)  # fmt: skip
def test_wrong_tensors_under_a_right_checksum(model, path, tensors, said):
    forged(path, tensors)
    state = load_state(path)
    for use in (lambda: load_state(path, model), lambda: state.cache(model)):
        with pytest.raises(LinearizeError, match=said) as error:
            use()
        assert "--save-state" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"tokens": 0}, "its tokens are 0"),
        ({"tokens": 10**15}, "its tokens are 1000000000000000"),
        ({"last": -1}, "its last are -1"),
        ({"digest": "zz"}, "its digest of the text is none"),
        ({"identity": {"config": 3}}, "its description of the model is none"),
        ({"tokens": True}, "its description lacks something"),
    ],
)
def test_wrong_facts_under_a_right_checksum(path, facts, said):
    with pytest.raises(CheckpointError, match=said):
        load_state(forged(path, **facts))


def test_facts_that_only_the_model_can_judge(model, path):
    with pytest.raises(LinearizeError, match="last token is 99,999, which the model does not have"):
        load_state(forged(path, last=99_999), model)
    with pytest.raises(LinearizeError, match=r"after 22 tokens"):
        load_state(forged(path, last=1, tokens=22), model)


@pytest.mark.parametrize("name", covering.recipes([name for name, _ in list_recipes()], covering.states))
def test_a_false_count_of_tokens_is_held_against_the_layers(name):
    """As it was read, at once and token by token, it is taken; of another length only where no layer says which."""
    mixer, _, mixers = mixers_of(name)
    for section in sections(mixer, mixers).values():
        model = surgery.convert(tiny.model(num_hidden_layers=2), section)
        ids = tiny.tokens(1, 150)
        for length in (1, 2, 5, 70, 150):
            text = ids[:, :length]
            first = 60 if length > 60 else 0  # then token by token
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                for piece in [*([text[:, :first]] if first else []), *text[:, first:].split(1, 1)]:
                    model(piece, **{cache_name(model): cache})
            for state in (read_ids(model, text), state_of(model, cache, text)):
                _counts_are_held(model, state)


def _counts_are_held(model, state):
    state.check(model)
    names = {split(name)[1] for name in state.tensors}
    whole = {split(name)[1] for name, x in state.tensors.items() if x.dtype in (torch.int32, torch.int64)}
    assert whole <= {*COUNTERS, RING}  # of another one it is to be said what it counts
    told = names & {*COUNTERS, "keys"} or ("window_valid" in names and RING not in names)
    full = max((x.numel() - 1 for name, x in state.tensors.items() if name.endswith("_valid")), default=0)
    for tokens in {max(1, state.tokens - 1), state.tokens + 1, 2 * state.tokens + 40, 2**31 - 1} - {
        state.tokens
    }:
        if told or min(tokens, full) != min(
            state.tokens, full
        ):  # a full ring says no more than that it is full
            with pytest.raises(LinearizeError, match=f"{tokens:,}.*; the file was not written by this model"):
                replace(state, tokens=tokens).check(model)


def test_ids_that_do_not_fit_into_memory(monkeypatch):
    """Of a state without any count: transformers wants an id for each token."""
    model = surgery.convert(tiny.model(num_hidden_layers=1), {"feature_map": {"name": "elu"}})
    state = replace(read_ids(model, tiny.tokens(1, 21)), tokens=2**31 - 1)
    state.check(model)
    monkeypatch.setattr(memory, "machine", lambda: (2**34, 2**35))
    ids = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(
        LinearizeError, match=r"ids of 2,147,483,647 tokens.* need more memory .* 16 GiB are free"
    ):
        behind(model, state, ids)
    monkeypatch.setattr(memory, "machine", lambda: (0, 0))  # who knows
    assert behind(model, replace(state, tokens=21), ids)["input_ids"].shape == (1, 22)


def test_sums_of_something_else(tmp_path):
    """States of whole features, as they were before sums were of what is above the map's value at zero."""
    mixer = {"feature_map": {"name": "elu"}, "update": {"name": "mala"}, "normalizer": {"name": "none"}}
    model = surgery.convert(tiny.model(num_hidden_layers=1), mixer)
    path = save_state(read_ids(model, tiny.tokens(1, 21)), tmp_path / "a.state")
    load_state(path, model)
    forged(path, lambda held: {name.replace("_from_zero", ""): x for name, x in held.items()})
    with pytest.raises(
        LinearizeError, match=r"'0\.norms', which none of this model's layers holds; .*read the text again"
    ):
        load_state(path, model)


def test_names_that_are_none(path):
    with pytest.raises(CheckpointError, match=r"a tensor is called 'sums', and should be LAYER\.NAME"):
        load_state(forged(path, lambda held: {**held, "sums": torch.zeros(1)}))


def test_as_written_it_is_taken(model, path):
    assert load_state(forged(path), model).tokens == 21


@pytest.mark.parametrize("tokens", [1, 2, 3, 21])
def test_lengths_about_a_sliding_window_are_taken(tokens):
    """Softmax in a window, by transformers and by a mixer: what is kept of it depends on the length."""
    for made in (
        tiny.model("mistral", sliding_window=3),
        surgery.convert(tiny.model("mistral", sliding_window=3), tiny.SOFTMAX),
    ):
        state = read_ids(made, tiny.tokens(1, tokens))
        assert isinstance(state, Prefix)
        state.check(made)


@pytest.mark.parametrize("number", ["9" * 5000, "0", "-1", "\u0661", "\u00b2", "1.0", ""])
def test_formats_that_are_none(path, number):
    tensors = load_file(path)
    save_file(tensors, path, {**_metadata(path), "format": number})
    with pytest.raises(CheckpointError, match=r"is no state, cut short or damaged|newer linearize"):
        load_state(path)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([], "no token to read"),
        ([3, -1], "the id -1 is no token of the model"),
        ([tiny.VOCABULARY], "the id 97 is no token of the model, whose embedding has rows 0 to 96"),
        ([2**70], "is no token of the model"),
        ([1.5], "ids must be whole numbers"),
        (["a"], "ids must be whole numbers"),
        (torch.ones(3), "ids must be whole numbers"),
        (torch.ones(1, 1, 3, dtype=torch.int64), r"ids of the shape \[1, 1, 3\]"),
    ],
)
def test_ids_that_are_none(model, ids, said):
    with pytest.raises(LinearizeError, match=said):
        read_ids(model, ids)
