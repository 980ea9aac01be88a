"""Rows that come and go: each gives the tokens that `model.generate` gives it alone, whoever its neighbours are."""

from __future__ import annotations

import random

import pytest
import tiny
import torch
from decoding import HEDGEHOG, LOLCATS, MIXERS, devices, hybrid

from linearize.bench.subjects import convert, random_model, subjects
from linearize.decode.row_choice import NO_NUMBER, Wish
from linearize.decode.sampling import Sampling
from linearize.decode.slots import Slots
from linearize.errors import LinearizeError

NEW = 9


def alone(model, ids: list[int], tokens: int) -> list[int]:
    """What `generate` makes of a prompt on its own, never ending early."""
    given = torch.tensor([ids], device=model.device)
    made = model.generate(given, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    return made[0, len(ids) :].tolist()


def prompt(length: int, seed: int) -> list[int]:
    return tiny.tokens(1, length, seed)[0].tolist()


def read(slots: Slots, ids: list[int], piece: int):
    slots.begin()
    for first in range(0, len(ids), piece):
        logits = slots.read(ids[first : first + piece])
    return logits


class Served:
    """A text in a slot, beside what it is to be."""

    def __init__(self, slots: Slots, ids: list[int], tokens: int, piece: int) -> None:
        self.ids, self.tokens = ids, tokens
        _, made = slots.admit(read(slots, ids, piece), Wish())
        self.made = made.tokens[0].tolist()


def together(model, slots: Slots, seed: int, texts: int = 14, abort: float = 0.2, longest: int = 30) -> int:
    """Random arrivals, lengths, pieces, steps and aborts; checks every text that ends."""
    dice, rows, checked, started = random.Random(seed), [], 0, 0
    while started < texts or rows:
        while started < texts and slots.live < slots.rows and dice.random() < 0.7:
            started += 1
            ids = prompt(dice.choice([1, 2, dice.randint(3, longest)]), 100 * seed + started)
            rows.append(Served(slots, ids, dice.randint(1, NEW), dice.choice([1, 3, 8, 50])))
        if rows:
            block = slots.run(dice.randint(1, 3)).tokens.tolist()
            for row, tokens in zip(rows, block, strict=True):
                row.made += tokens
        for index in reversed(range(len(rows))):
            ended = len(rows[index].made) >= rows[index].tokens
            if ended or dice.random() < abort:
                if ended:
                    row = rows[index]
                    assert row.made[: row.tokens] == alone(model, row.ids, row.tokens), (seed, row.ids)
                    checked += 1
                slots.drop(index)
                rows[index] = rows[-1]
                rows.pop()
    return checked


@devices
@pytest.mark.parametrize("layers", ["all", [1, 2], []], ids=["all", "hybrid", "teacher"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_gives_the_tokens_of_generate(family, layers, device):
    """Kept softmax layers with and without a sliding window, learned positions, and a model that nobody converted."""
    model = hybrid(family, layers, device=device) if layers else tiny.model(family).to(device)
    assert together(model, Slots(model, 3, 48, most=48), seed=1, texts=8) >= 3


@devices
@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_every_kind_of_state(mixer, device):
    model = hybrid("llama", "all", mixer, device, num_hidden_layers=2)
    assert together(model, Slots(model, 3, 64), seed=2) >= 5


@pytest.mark.parametrize("name", subjects())
def test_of_every_recipe(name):
    model = convert(random_model("cpu", torch.float32, "tiny", hidden_size=64, num_hidden_layers=2), name)
    # far from uniform, so that a row that is not its own shows
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    assert together(model.eval(), Slots(model, 3, 64), seed=5, texts=5) >= 2


@pytest.mark.slow
@devices
@pytest.mark.parametrize("seed", range(20))
def test_many_arrivals(seed, device):
    model = hybrid("llama", [0, 2], device=device)
    assert together(model, Slots(model, 5, 64), seed=10 + seed, texts=60) >= 20


@devices
def test_a_row_that_ends_leaves_its_place_to_the_last(device):
    model = hybrid("llama", [1], device=device)
    slots = Slots(model, 4, 64)
    texts = [prompt(length, length) for length in (5, 17, 9)]
    made = [Served(slots, ids, NEW, 8).made for ids in texts]
    for row, tokens in enumerate(slots.run(2).tokens.tolist()):
        made[row] += tokens
    slots.drop(0)
    for row, tokens in zip([2, 1], slots.run(4).tokens.tolist(), strict=True):
        made[row] += tokens
    assert made[1] == alone(model, texts[1], 7) and made[2] == alone(model, texts[2], 7)


def test_a_draw_is_the_rows_own():
    """The same seed gives the same text, alone or beside others that are greedy or draw as well."""
    model = hybrid(num_hidden_layers=2)
    slots = Slots(model, 4, 64)
    wish = Sampling(True, 0.9, 12, 0.95)

    def made(others: int) -> list[int]:
        for other in range(others):
            slots.admit(read(slots, prompt(4 + other, other), 8), Wish(Sampling(bool(other % 2)), other))
        row, first = slots.admit(read(slots, prompt(7, 50), 8), Wish(wish, seed=3))
        tokens = first.tokens[0].tolist() + slots.run(NEW).tokens[row].tolist()
        slots.clear()
        return tokens

    assert made(0) == made(3) == made(1)
    assert len({tuple(made(0)) for _ in range(2)}) == 1


def test_a_row_without_numbers_says_so_and_its_slot_is_clean_afterwards():
    model = hybrid("llama", [1], num_hidden_layers=3)
    slots = Slots(model, 2, 64)
    good = prompt(9, 1)
    with torch.no_grad():
        sound = model.get_input_embeddings().weight[5].clone()
        model.get_input_embeddings().weight[5] = float("nan")
    slots.admit(read(slots, good, 50), Wish())
    assert slots.admit(read(slots, [7, 5, 9], 50), Wish())[1].tokens.item() == NO_NUMBER
    tokens = slots.run(2).tokens
    assert (tokens[1] == NO_NUMBER).all() and (tokens[0] != NO_NUMBER).all()
    slots.drop(1, broken=True)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = sound
    row = Served(slots, prompt(2, 3), NEW, 50)
    row.made += slots.run(NEW - 1).tokens[1].tolist()
    assert row.made == alone(model, row.ids, NEW)


def test_scores_are_those_of_the_model():
    model = hybrid(num_hidden_layers=2)
    slots = Slots(model, 2, 64)
    ids = prompt(6, 2)
    slots.admit(read(slots, prompt(9, 4), 50), Wish())
    _, first = slots.admit(read(slots, ids, 50), Wish(scores=3))
    block = slots.run(2)
    text = ids + first.tokens[0].tolist() + block.tokens[1].tolist()
    with torch.no_grad():
        expected = model(torch.tensor([text])).logits[0].log_softmax(-1)
    for step, (scores, row) in enumerate([(first.scores[0], 0), (block.scores[0], 1), (block.scores[1], 1)]):
        here = expected[len(ids) - 1 + step]
        assert torch.allclose(scores.chosen[row], here[text[len(ids) + step]], atol=1e-4)
        assert torch.allclose(scores.top[row], here.topk(3).values, atol=1e-4)
        assert scores.ids[row].tolist() == here.topk(3).indices.tolist()


def test_what_cannot_be_is_refused():
    chunked = hybrid("llama", [1])
    chunked.config._attn_implementation = "flex_attention"
    with pytest.raises(LinearizeError, match=r"come and go.*flex_attention"):
        Slots(chunked, 2, 32)
    slots = Slots(hybrid("llama", [1]), 2, 32)
    with pytest.raises(LinearizeError, match="more than 32 tokens"):
        read(slots, prompt(33, 1), 16)


def test_nothing_grows(monkeypatch):
    model = hybrid("llama", "all", LOLCATS, num_hidden_layers=2)
    slots = Slots(model, 3, 0)
    together(model, slots, seed=3, texts=4)
    places = {name: (x.data_ptr(), x.shape) for name, x in slots._held.held.items()}
    together(model, slots, seed=4, texts=6, longest=90)
    assert {name: (x.data_ptr(), x.shape) for name, x in slots._held.held.items()} == places
    assert slots.bytes > 0


def test_a_state_that_moves_is_refused(monkeypatch):
    from linearize import surgery

    model = hybrid(mixer=HEDGEHOG, num_hidden_layers=1)
    mixer = surgery.converted(model)[0].mixer
    step = mixer.step

    def moving(*args, state, **given):
        out = step(*args, state=state, **given)
        state["sums"] = state["sums"].clone()
        return out

    monkeypatch.setattr(mixer, "step", moving)
    with pytest.raises(LinearizeError, match=r"not written in place.*0\.sums"):
        Slots(model, 1, 0).prepare()


def test_more_slots_than_there_is_memory_for():
    model = hybrid("llama", [1], num_hidden_layers=2)
    with pytest.raises(LinearizeError, match=r"3 slots need more memory.*take fewer"):
        Slots(model, 3, 10**12).prepare()
