"""Pieces of prompts of one shape: recorded once, replayed with other tokens at other places."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import tiny
import torch
from decoding import HEDGEHOG, MIXERS, hybrid
from recordings import Card, on_cpu

from linearize.bench.subjects import convert, random_model, subjects
from linearize.decode import pieces
from linearize.decode.row_choice import Wish
from linearize.decode.slots import Slots
from linearize.errors import LinearizeError
from linearize.recording import record as record_on_a_device

SIZES = {"hidden_size": 64, "head_dim": 64, "num_hidden_layers": 2}


@pytest.fixture
def card():
    return Card()


@pytest.fixture
def graphs(monkeypatch, card):
    return on_cpu(monkeypatch, card, words=97)


def read(model, prompts, width: int, *, records: bool) -> list[list[int]]:
    """Tokens that follow prompts which are read together, so many tokens of each a call."""
    slots = Slots(model, len(prompts), 200, prompts=len(prompts))
    slots.prepare()
    slots._reading._pieces._records = records and not slots._rows.held
    for _ in prompts:
        slots.begin()
    for first in range(0, len(prompts[0]), width):
        logits = slots.read([ids[first : first + width] for ids in prompts])
    first = slots.admit(range(len(prompts)), logits, [Wish()] * len(prompts)).tokens
    return torch.cat([first, slots.run(6).tokens], 1).tolist()


@pytest.mark.parametrize("mixer", ["lolcats", "linear", "lawcat", "terraced", "pinned", "rwkv7"])
def test_a_recorded_piece_reads_what_comes(mixer, graphs):
    model = hybrid(mixer=MIXERS[mixer])
    prompts = [tiny.tokens(1, 61, seed)[0].tolist() for seed in (1, 2, 3)]
    made = read(model, prompts, 6, records=True)
    # ten pieces of six behind the first, two of them as they come, and one of one token
    assert [graph.replays for graph in graphs] == [7]
    assert made == read(model, prompts, 6, records=False)


def test_kept_softmax_layers_are_not_recorded(graphs):
    prompts = [tiny.tokens(1, 61, seed)[0].tolist() for seed in (1, 2)]
    assert read(hybrid(mixer=HEDGEHOG, layers=[0]), prompts, 6, records=True) and not graphs


def test_what_cannot_be_recorded_is_read_as_it_comes(monkeypatch, caplog, graphs):
    calls = []

    def record(call, beside):
        calls.append(call)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(pieces, "record", record)
    model = hybrid(mixer=HEDGEHOG)
    prompts = [tiny.tokens(1, 61, seed)[0].tolist() for seed in (1, 2)]
    assert read(model, prompts, 6, records=True) == read(model, prompts, 6, records=False)
    assert len(calls) == 1 and "not permitted" in caplog.text


def ask(asked: pieces.Pieces, width: int, times: int = 1) -> None:
    """Read so many tokens of one prompt, so often; each makes their sum."""
    ids = torch.arange(width)[None]
    for _ in range(times):
        made = asked(
            lambda ids, places: ids.sum(1, keepdim=True).expand(1, 97).float(), ids, ids, behind=True
        )
        assert made[0].tolist() == [sum(range(width))] * 97


def test_few_shapes_are_kept(graphs):
    """Those that come most: another takes a place once it came twice as often, and what came long ago counts less."""
    asked, often = pieces.Pieces(True), pieces.SEEN + 1
    for width in range(1, pieces.MOST + 2):
        ask(asked, width, often)
    assert [key[1] for key in asked._graphs] == list(range(1, pieces.MOST + 1)) and len(graphs) == pieces.MOST
    ask(asked, 2), ask(asked, pieces.MOST + 1, often + 1)
    assert [key[1] for key in asked._graphs] == [2, *range(3, pieces.MOST + 2)]
    ask(asked, 1, pieces.REMEMBERED)
    assert asked._seen[1, 2, True] < often and sum(asked._seen.values()) <= pieces.REMEMBERED


def test_a_length_that_is_new_when_counts_are_halved(graphs, monkeypatch):
    monkeypatch.setattr(pieces, "REMEMBERED", 2 * pieces.SEEN)
    asked = pieces.Pieces(True)
    ask(asked, 1, pieces.REMEMBERED)
    ask(asked, 2)
    assert asked._seen == {(1, 1, True): pieces.SEEN} and list(asked._graphs) == [(1, 1, True)]


def test_lengths_that_never_come_again_are_not_recorded_again_and_again(graphs):
    asked, dice = pieces.Pieces(True), random.Random(0)
    for _ in range(2000):
        ask(asked, 2048 if dice.random() < 0.5 else dice.randint(1, 40))
    assert len(graphs) < 5 * pieces.MOST and (1, 2048, True) in asked._graphs


def test_shapes_share_their_memory(graphs, card):
    asked = pieces.Pieces(True)
    for width in range(1, 5):
        ask(asked, width, pieces.SEEN + 1)
    assert card.taken == card.piece and len(asked._graphs) == 4 and asked.obstacle is None


@pytest.mark.parametrize("free, kept", [(199, 0), (200, 1), (299, 1), (300, 4)])
def test_room_is_left_for_what_is_not_recorded(graphs, card, caplog, free, kept):
    """Of a recording that takes 100 as much has to be free afterwards, and of a further one twice as much before."""
    card.free = free
    asked = pieces.Pieces(True)
    for width in range(1, 5):
        ask(asked, width, pieces.SEEN + 3)
    assert len(asked._graphs) == kept and asked.records == bool(kept)
    if not kept:
        assert len(graphs) == 1 and "as they come" in caplog.text and "are free" in asked.obstacle


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_what_a_recording_had_taken_is_free_before_the_piece_is_read(monkeypatch, graphs, kind):
    """Without waiting for the collector of circles."""
    held = []

    class Failing:
        def __init__(self, graph, **options) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *error) -> None:
            pass

    class Stub:
        def clone_state(self):
            return None

        def graphsafe_set_state(self, state) -> None:
            pass

    for name, value in {
        "current_stream": lambda: None, "set_stream": lambda stream: None, "current_device": lambda: 0,
        "default_generators": [Stub()], "CUDAGraph": object, "graph_pool_handle": lambda: (0, 1), "graph": Failing,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(pieces, "record", record_on_a_device)
    asked = pieces.Pieces(True)

    def read(ids, places):
        activations = torch.zeros(1000)
        if len(held) == pieces.SEEN:  # the recording
            held.append(weakref.ref(activations))
            raise kind("no room")
        if len(held) > pieces.SEEN:
            assert held[pieces.SEEN]() is None
        held.append(weakref.ref(activations))
        return torch.zeros(1, 97)

    ids = torch.zeros(1, 3, dtype=torch.int64)
    gc.disable()
    try:
        for _ in range(pieces.SEEN + 1):
            asked(read, ids, ids, behind=True)
    finally:
        gc.enable()
    assert len(held) == pieces.SEEN + 2 and asked.obstacle == "no room"


def test_memory_that_runs_out_beside_recorded_pieces_frees_them(graphs, caplog):
    asked = pieces.Pieces(True)
    ask(asked, 5, pieces.SEEN + 1)

    def read(ids, places):
        raise torch.OutOfMemoryError("out of memory")

    ids = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(torch.OutOfMemoryError):
        asked(read, ids, ids, behind=True)
    assert not asked._graphs and not asked.records and "beside recorded pieces" in caplog.text
    ask(asked, 5)


def recording(slots: Slots) -> Slots:
    """Slots that record pieces, without a card."""
    slots.prepare()
    slots._reading._pieces._records = not slots._rows.held
    return slots


@pytest.mark.parametrize("layers", ["all", [0]], ids=["converted", "hybrid"])
def test_warm_slots_have_recorded_what_comes(layers, graphs):
    model = hybrid(mixer=HEDGEHOG, layers=layers)
    slots = recording(Slots(model, 3, 100, prompts=3))
    slots.warm(30, 90)
    shapes = {(1, 30, False), (1, 30, True), (3, 10, False), (3, 10, True)} if layers == "all" else set()
    assert set(slots._reading._pieces._graphs) == shapes and not slots._reading.read_of
    prompts = [tiny.tokens(1, 60, seed)[0].tolist() for seed in (1, 2, 3)]
    fresh = read(model, prompts, 10, records=False)
    for _ in prompts:
        slots.begin()
    for first in range(0, 60, 10):
        logits = slots.read([ids[first : first + 10] for ids in prompts])
    made = slots.admit(range(3), logits, [Wish()] * 3).tokens
    assert torch.cat([made, slots.run(6).tokens], 1).tolist() == fresh
    assert sum(graph.replays for graph in graphs) > 5 if layers == "all" else not graphs


@pytest.mark.parametrize("layers", ["all", [1], []], ids=["all", "hybrid", "teacher"])
def test_pieces_longer_than_a_text_may_be(layers):
    """As those of 2,048 tokens are where a table of positions has 1,024."""
    model = hybrid("gpt2", layers) if layers else tiny.model("gpt2")
    slots = Slots(model, 2, 48, most=48, prompts=2)
    slots.warm(2048, 4096)
    assert slots.live == 0 and slots.begin() == 0


def test_reading_that_does_not_fit_beside_the_slots_is_told_at_once(monkeypatch):
    slots = Slots(hybrid(mixer=HEDGEHOG), 3, 100, prompts=3)
    slots.prepare()
    call = slots._reading._call

    def without_room(ids, *rest):
        if ids.numel() == 30:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(ids, *rest)

    monkeypatch.setattr(slots._reading, "_call", without_room)
    with pytest.raises(LinearizeError, match=r"3 slots that read 30 tokens.*take fewer, smaller pieces"):
        slots.warm(30, 90)


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("name", subjects())
def test_every_recipe_reads_recorded_pieces(name):
    """Equal to the bit: the same kernels, launched by the device, of two shapes in turn that share their memory."""
    model = convert(random_model("cuda", torch.bfloat16, "tiny", **SIZES), name).requires_grad_(False)
    dice = torch.Generator().manual_seed(0)
    prompts = torch.randint(97, (2, 195), generator=dice).tolist()
    held = []
    for records in (True, False):
        slots = Slots(model, 2, 200, prompts=2)
        slots.prepare()
        reading = slots._reading._pieces
        reading._records = records and not slots._rows.held
        for _ in prompts:
            slots.begin()
        for first in range(0, 195, 39):
            slots.read([ids[first : first + 26] for ids in prompts])
            logits = slots.read([ids[first + 26 : first + 39] for ids in prompts])
        assert reading.obstacle is None
        assert len(reading._graphs) == 2 * int(records and not slots._rows.held)
        held.append([logits, *slots._reading._held.held.values()])
    assert all(torch.equal(one, other) for one, other in zip(*held, strict=True))


def taken() -> int:
    gc.collect()
    return pieces.memory(torch.device("cuda"))[0]


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("what", ["memory", "operation"])
def test_a_recording_that_fails_gives_its_memory_back(what):
    x = torch.ones(2**20, device="cuda")
    record_on_a_device(lambda: x + 1)
    before = taken()

    def fails():
        made = [x.repeat(64) for _ in range(4)]  # a GiB
        if what == "memory":
            raise torch.OutOfMemoryError("no room")
        return made[0].sum().item()

    with pytest.raises(RuntimeError):
        record_on_a_device(fails)
    assert taken() - before < 2**26
    graph, made = record_on_a_device(lambda: x + 1)
    graph.replay()
    assert made[0].item() == 2


@pytest.mark.gpu
@CUDA
def test_graphs_beside_each_other_share_their_memory():
    x = torch.ones(2**20, device="cuda")

    def call():
        return (x.repeat(64) * 2)[-5:].clone()

    wanted, before = call(), taken()
    graph, made = record_on_a_device(call)
    one = taken() - before
    others = [record_on_a_device(call, graph) for _ in range(4)]
    assert one > 2**28 and taken() - before < 1.5 * one
    for each, result in [*others, (graph, made)]:
        each.replay()
        assert torch.equal(result, wanted)
    del graph, others, each
    assert taken() - before < 2**26
