"""Pieces of prompts of one shape: recorded once, replayed with other tokens at other places."""

from __future__ import annotations

import pytest
import tiny
import torch
from decoding import HEDGEHOG, MIXERS, hybrid

from linearize.bench.subjects import convert, random_model, subjects
from linearize.decode import pieces
from linearize.decode.row_choice import Wish
from linearize.decode.slots import Slots

SIZES = {"hidden_size": 64, "head_dim": 64, "num_hidden_layers": 2}


class Graph:
    """Stands for a CUDA graph: what was called, again, into the same memory."""

    def __init__(self, call, made) -> None:
        self.call, self.made, self.replays = call, made, 0

    def replay(self) -> None:
        self.replays += 1
        self.made.copy_(self.call())


@pytest.fixture
def graphs(monkeypatch):
    """Graphs that were made, where a recording computes nothing, as on a card."""
    found = []

    def record(call):
        asked = next(
            x.cell_contents for x in call.__closure__ if isinstance(x.cell_contents, pieces.Recorded)
        )
        made = torch.full((len(asked._ids), 97), torch.nan)
        found.append(Graph(call, made))
        return found[-1], made

    monkeypatch.setattr(pieces, "record", record)
    return found


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


def test_what_cannot_be_recorded_is_read_as_it_comes(monkeypatch, caplog):
    calls = []

    def record(call):
        calls.append(call)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(pieces, "record", record)
    model = hybrid(mixer=HEDGEHOG)
    prompts = [tiny.tokens(1, 61, seed)[0].tolist() for seed in (1, 2)]
    assert read(model, prompts, 6, records=True) == read(model, prompts, 6, records=False)
    assert len(calls) == 1 and "not permitted" in caplog.text


def test_few_shapes_are_kept(graphs):
    asked = pieces.Pieces(True)
    for width in range(1, pieces.MOST + 3):
        for _ in range(pieces.SEEN + 1):
            ids = torch.zeros(1, width, dtype=torch.int64)
            asked(lambda ids, places: ids.new_zeros(1, 97, dtype=torch.float32), ids, ids, behind=True)
    assert len(graphs) == pieces.MOST + 2 and len(asked._graphs) == pieces.MOST


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", subjects())
def test_every_recipe_reads_recorded_pieces(name):
    """Equal to the bit: the same kernels, launched by the device."""
    model = convert(random_model("cuda", torch.bfloat16, "tiny", **SIZES), name).requires_grad_(False)
    dice = torch.Generator().manual_seed(0)
    prompts = torch.randint(97, (2, 130), generator=dice).tolist()
    held = []
    for records in (True, False):
        slots = Slots(model, 2, 200, prompts=2)
        slots.prepare()
        reading = slots._reading._pieces
        reading._records = records and not slots._rows.held
        for _ in prompts:
            slots.begin()
        for first in range(0, 130, 26):
            logits = slots.read([ids[first : first + 26] for ids in prompts])
        assert reading.obstacle is None
        assert len(reading._graphs) == int(records and not slots._rows.held)
        held.append([logits, *slots._reading._held.held.values()])
    assert all(torch.equal(one, other) for one, other in zip(*held, strict=True))
