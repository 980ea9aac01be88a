"""When generation takes the graph's engine and when transformers': options, models, reuse, text as it comes."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import tiny
import torch

from linearize import surgery
from linearize.decode import choice, reuse
from linearize.decode.choice import Request, obstacles, request
from linearize.decode.engine import Decoder
from linearize.decode.generate import generate_ids
from linearize.decode.sampling import Sampling
from linearize.errors import LinearizeError

GREEDY = {"do_sample": False, "max_new_tokens": 9}


@pytest.fixture
def model():
    made = surgery.convert(tiny.model("llama", num_hidden_layers=2), tiny.LOLCATS)
    tiny.randomize(layer.mixer for layer in surgery.converted(made))
    return made


@pytest.fixture
def on_cpu(monkeypatch):
    """The engine without a graph, so that the way to it is tested where there is no GPU."""
    monkeypatch.setattr(choice, "DEVICE", "cpu")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Request(15, Sampling(), (2,), 0)),
        ({"max_new_tokens": 7, "pad_token_id": 4, "eos_token_id": [2, 9]}, Request(7, Sampling(), (2, 9), 4)),
        (
            {"temperature": None, "top_p": None, "top_k": None, "max_length": 8},
            Request(3, Sampling(), (2,), 0),
        ),
        ({"do_sample": True}, Request(15, Sampling(True, 1.0, 50, 1.0), (2,), 0)),
        (
            {"do_sample": True, "temperature": 0.5, "top_k": 0, "top_p": 0.9, "eos_token_id": None},
            Request(15, Sampling(True, 0.5, 0, 0.9), (), 0),
        ),
    ],
    ids=["nothing", "ends", "length", "sampling", "settings"],
)
def test_reads_what_generate_would_do(model, options, expected):
    assert request(model, 5, options) == (expected, [])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"num_beams": 3}, "beam search"),
        ({"repetition_penalty": 1.2}, "option repetition_penalty"),
        ({"do_sample": True, "min_p": 0.1}, "option min_p"),
        ({"min_new_tokens": 3}, "option min_new_tokens"),
        ({"cache_implementation": "static"}, "option cache_implementation"),
        ({"streamer": object()}, "option streamer"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
        ({"num_return_sequences": 2, "do_sample": True}, "option num_return_sequences"),
    ],
)
def test_what_is_left_to_transformers(model, options, problem):
    found, problems = request(model, 5, options)
    assert found is None and problem in problems


def test_what_in_a_model_stands_in_the_way(model, on_cpu):
    assert obstacles(model) == []
    with surgery.mode(model, "teacher"):
        assert obstacles(model) == ["the converted layers run as their teacher"]
    growing = surgery.convert(tiny.model(), tiny.SOFTMAX, [1, 2])
    assert obstacles(growing) == [], "over a text of known length its keys have a place each"
    kept = surgery.convert(tiny.model(), tiny.LOLCATS, [0])
    assert obstacles(kept) == []
    kept.config._attn_implementation = "flash_attention_2"
    assert obstacles(kept) == ["softmax layers with the attention function flash_attention_2"]
    assert obstacles(torch.nn.Linear(1, 1)) == ["a Linear is not a model of transformers itself"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing on the CPU")
def test_insisting_where_there_is_none(model):
    ids = tiny.tokens(1, 5)
    assert generate_ids(model, ids, None, GREEDY) is None
    with pytest.raises(
        LinearizeError, match="graph=True: the model is on cpu, and CUDA graphs need a CUDA device"
    ):
        generate_ids(model, ids, None, GREEDY, graph=True)


def test_insisting_on_what_is_not_covered(model, on_cpu):
    ids = tiny.tokens(1, 5)
    with pytest.raises(
        LinearizeError, match="graph=True: beam search; option num_beams; without it transformers decodes"
    ):
        generate_ids(model, ids, None, {**GREEDY, "num_beams": 2}, graph=True)
    assert generate_ids(model, ids, None, GREEDY, graph=False) is None
    assert generate_ids(tiny.model(), ids, None, GREEDY) is None, "a teacher is not ours to decode"


def test_decoders_are_kept_until_the_model_changes(model, on_cpu):
    ids, mask, _ = tiny.left_padded(length=12)
    first = generate_ids(model, ids, mask, GREEDY)
    wanted = model.generate(ids, attention_mask=mask, **GREEDY)[:, 12:]
    assert torch.equal(first, wanted)
    kept = vars(model)[reuse._NAME]
    (decoder,) = kept.values()
    assert torch.equal(generate_ids(model, ids, mask, {**GREEDY, "max_new_tokens": 20})[:, :9], wanted)
    assert list(kept.values()) == [decoder], "neither length nor tokens need another graph"
    generate_ids(model, ids[:1], None, GREEDY)
    assert len(kept) == 2
    for temperature in (0.2, 0.3, 0.4, 0.5):
        generate_ids(model, ids, mask, {**GREEDY, "do_sample": True, "temperature": temperature})
    assert len(kept) == reuse.KEPT and decoder not in kept.values()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0))
    changed = generate_ids(model, ids, mask, GREEDY)
    assert torch.equal(changed, model.generate(ids, attention_mask=mask, **GREEDY)[:, 12:])
    assert not torch.equal(changed, wanted) and len(kept) == 1


def test_a_copy_has_no_decoders_and_nothing_is_kept_alive(model, on_cpu, tmp_path):
    ids = tiny.tokens(1, 5)
    made = generate_ids(model, ids, None, GREEDY)
    other = copy.deepcopy(model)
    assert not vars(other)[reuse._NAME] and torch.equal(generate_ids(other, ids, None, GREEDY), made)
    model.save_pretrained(tmp_path)
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
    reuse.forget(model)
    assert reuse._NAME not in vars(model)


def test_a_hybrid_gets_a_longer_decoder_for_a_longer_text(on_cpu):
    model = surgery.convert(tiny.model("llama", num_hidden_layers=2), tiny.LOLCATS, [0])
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    for length in (5, 9, 300):
        ids = tiny.tokens(1, length)
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)[:, length:]
        assert torch.equal(generate_ids(model, ids, None, GREEDY), wanted)
    assert [decoder.length for decoder in vars(model)[reuse._NAME].values()] == [256, 512]


def test_a_text_that_outgrows_its_rotation_is_left_to_transformers(on_cpu):
    """Phi-3 reads the whole text again where its rotation becomes another; kept keys would stay as they were."""
    factors = {
        "short_factor": [1.0 + x / 10 for x in range(4)],
        "long_factor": [2.0 + x / 3 for x in range(4)],
    }
    own = {"original_max_position_embeddings": 12}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors, **own}
    made = tiny.model("phi3", num_hidden_layers=2, rope_parameters=rope, max_position_embeddings=48, **own)
    made = surgery.convert(made, tiny.LOLCATS)
    tiny.randomize(layer.mixer for layer in surgery.converted(made))
    for length, taken in ((3, True), (8, False), (12, False), (13, True)):
        ids = tiny.tokens(1, length)
        found = generate_ids(made, ids, None, GREEDY)
        assert (found is not None) is taken
        if found is not None:
            wanted = made.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)[:, length:]
            assert torch.equal(found, wanted)
    with pytest.raises(LinearizeError, match=r"17 tokens with the RoPE 'longrope'.*beyond 12; without it"):
        generate_ids(made, tiny.tokens(1, 8), None, GREEDY, graph=True)


def test_what_cannot_be_captured_goes_on_without(model, on_cpu, monkeypatch):
    def fails(self):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(Decoder, "prepare", fails)
    ids = tiny.tokens(1, 5)
    with pytest.warns(
        UserWarning, match="going on without: operation not permitted when stream is capturing$"
    ):
        assert generate_ids(model, ids, None, GREEDY) is None
    with pytest.raises(RuntimeError, match="not permitted"):
        generate_ids(model, ids, None, GREEDY, graph=True)


def test_training_mode_comes_back(model, on_cpu):
    model.train()
    generate_ids(model, tiny.tokens(1, 5), None, GREEDY)
    assert model.training
