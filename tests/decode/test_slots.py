"""Rows that come and go: each gives the tokens that `model.generate` gives it alone, whoever its neighbours are."""

from __future__ import annotations

import random

import covering
import odd
import pytest
import tiny
import torch
from decoding import HEDGEHOG, LOLCATS, MIXERS, crossed, devices, hybrid

from linearize import surgery
from linearize.bench.subjects import convert, random_model, subjects
from linearize.decode.draft import Draft
from linearize.decode.prompts import widest
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


def admitted(slots: Slots, ids: list[int], piece: int = 50, wish: Wish | None = None):
    """Read a prompt alone and give it a row; what `admit` made."""
    slots.begin()
    for first in range(0, len(ids), piece):
        logits = slots.read([ids[first : first + piece]])
    return slots.admit([0], logits, [wish or Wish()])


class Served:
    """A text that is made, beside what it is to be."""

    def __init__(self, ids: list[int], tokens: int) -> None:
        self.ids, self.tokens, self.read = ids, tokens, 0
        self.made: list[int] = []


def without(texts: list[Served], index: int) -> Served:
    """Take one out; the last fills its place."""
    text, texts[index] = texts[index], texts[-1]
    texts.pop()
    return text


def together(model, slots: Slots, seed: int, texts: int = 14, abort: float = 0.2, longest: int = 30) -> int:
    """Random arrivals, lengths, pieces read together, steps and aborts; checks every text that ends."""
    dice, checked, started = random.Random(seed), 0, 0
    reading: list[Served] = []
    rows: list[Served] = []
    while started < texts or reading or rows:
        room = min(slots.prompts, slots.rows - slots.live)
        while started < texts and len(reading) < room and dice.random() < 0.8:
            started += 1
            ids = prompt(dice.choice([1, 2, dice.randint(3, longest)]), 100 * seed + started)
            assert slots.begin() == len(reading)
            reading.append(Served(ids, dice.randint(1, NEW)))
        if reading and dice.random() < abort / 4:
            gone = dice.randrange(len(reading))
            slots.forget(gone)
            without(reading, gone)
        if reading:
            pieces = [text.ids[text.read :][: dice.choice([1, 3, 8, 50])] for text in reading]
            logits = slots.read(pieces)
            for text, piece in zip(reading, pieces, strict=True):
                text.read += len(piece)
            done = [index for index, text in enumerate(reading) if text.read == len(text.ids)]
            if done:
                first = slots.admit(done, logits[done], [Wish()] * len(done)).tokens.tolist()
                for index, tokens in zip(done, first, strict=True):
                    reading[index].made += tokens
                    rows.append(reading[index])
                for index in reversed(done):
                    without(reading, index)
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
                without(rows, index)
    return checked


@devices
@crossed(["llama", "mistral", "gemma3", "gpt2"], {"all": "all", "hybrid": [1, 2], "teacher": []})
def test_gives_the_tokens_of_generate(family, layers, device):
    """Kept softmax layers with and without a sliding window, learned positions, and a model that nobody converted."""
    model = hybrid(family, layers, device=device) if layers else tiny.model(family).to(device)
    assert together(model, Slots(model, 3, 48, most=48, prompts=3), seed=1, texts=8) >= 3


@devices
@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_every_kind_of_state(mixer, device):
    model = hybrid("llama", "all", mixer, device, num_hidden_layers=2)
    assert together(model, Slots(model, 3, 64, prompts=3), seed=2) >= 5


@pytest.mark.parametrize("name", covering.recipes(subjects(), covering.states))
def test_of_every_recipe(name):
    model = convert(random_model("cpu", torch.float32, "tiny", hidden_size=64, num_hidden_layers=2), name)
    # far from uniform, so that a row that is not its own shows
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    assert together(model.eval(), Slots(model, 3, 64, prompts=3), seed=5, texts=5) >= 2


@pytest.mark.slow
@devices
@pytest.mark.parametrize("seed", range(20))
def test_many_arrivals(seed, device):
    model = hybrid("llama", [0, 2], device=device)
    assert together(model, Slots(model, 5, 64, prompts=4), seed=10 + seed, texts=60) >= 20


@devices
def test_a_row_that_ends_leaves_its_place_to_the_last(device):
    model = hybrid("llama", [1], device=device)
    slots = Slots(model, 4, 64)
    texts = [prompt(length, length) for length in (5, 17, 9)]
    made = [admitted(slots, ids, 8).tokens[0].tolist() for ids in texts]
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
            admitted(slots, prompt(4 + other, other), 8, Wish(Sampling(bool(other % 2)), other))
        first = admitted(slots, prompt(7, 50), 8, Wish(wish, seed=3))
        tokens = first.tokens[0].tolist() + slots.run(NEW).tokens[-1].tolist()
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
    admitted(slots, good)
    assert admitted(slots, [7, 5, 9]).tokens.item() == NO_NUMBER
    tokens = slots.run(2).tokens
    assert (tokens[1] == NO_NUMBER).all() and (tokens[0] != NO_NUMBER).all()
    slots.drop(1, broken=True)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = sound
    ids = prompt(2, 3)
    made = admitted(slots, ids).tokens[0].tolist() + slots.run(NEW - 1).tokens[1].tolist()
    assert made == alone(model, ids, NEW)


def test_prompts_of_one_call_do_not_hear_of_each_other():
    """A neighbour without numbers, read before in the same place and beside, changes nothing; nor does padding."""
    model = hybrid("llama", [1], num_hidden_layers=3)
    good, bad = prompt(9, 1), [7, 5, 9, 8, 6, 5, 4, 3, 9, 8, 5, 7, 4]
    slots = Slots(model, 3, 64, prompts=3)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = float("nan")

    def read(*texts: list[int]) -> list[torch.Tensor]:
        for _ in texts:
            slots.begin()
        logits = list(slots.read(texts))
        for index in reversed(range(len(texts))):
            slots.forget(index)
        return logits

    ids = [token for token in good if token != 5]
    wanted = read(ids)[0]
    broken, beside = read(bad, ids)
    assert beside.isfinite().all() and broken.isnan().any()
    torch.testing.assert_close(beside, wanted, rtol=1e-5, atol=1e-5)
    for place in range(3):  # where the broken one has been
        torch.testing.assert_close(read(*([ids] * 3))[place], wanted, rtol=1e-5, atol=1e-5)


def test_several_rows_are_given_at_once():
    """Each with its own settings and scores; what the others still read goes on."""
    model = hybrid("llama", [1], num_hidden_layers=3)
    slots = Slots(model, 4, 64, prompts=3)
    texts = [prompt(length, length) for length in (6, 20, 9)]
    for _ in texts:
        slots.begin()
    logits = slots.read([ids[:9] for ids in texts])
    drawn = Wish(Sampling(True, 0.9, 12, 0.95), seed=3)
    first = slots.admit([0, 2], logits[[0, 2]], [Wish(scores=2), drawn])
    assert first.scores is not None and first.scores[0].top.shape == (2, 2)
    made = first.tokens.tolist()
    for row, tokens in zip(made, slots.run(3).tokens.tolist(), strict=True):
        row += tokens
    assert made[0] == alone(model, texts[0], 4)
    last = slots.admit([0], slots.read([texts[1][9:]]), [Wish()]).tokens[0].tolist()
    assert last + slots.run(4).tokens[2].tolist() == alone(model, texts[1], 5)
    slots.clear()
    same = admitted(slots, texts[2], 9, Wish(Sampling(True, 0.9, 12, 0.95), seed=3)).tokens[0].tolist()
    assert same + slots.run(3).tokens[0].tolist() == made[1]


@pytest.mark.parametrize(
    ("left", "budget", "width"),
    [
        ([8192], 512, 512),
        ([8192] * 8, 8192, 1024),
        ([8192, 32, 32, 32], 4096, 32),  # short ones do not wait, nor are they padded to a long one's length
        ([100, 110, 120, 150], 2048, 150),
        ([5, 5, 5, 5], 2, 1),
        ([9, 1], 512, 1),
    ],
)
def test_how_wide_prompts_are_read(left, budget, width):
    assert widest(left, budget) == width


def test_scores_are_those_of_the_model():
    model = hybrid(num_hidden_layers=2)
    slots = Slots(model, 2, 64)
    ids = prompt(6, 2)
    admitted(slots, prompt(9, 4))
    first = admitted(slots, ids, wish=Wish(scores=3))
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
        admitted(slots, prompt(33, 1), 16)


def test_rotations_that_change_with_the_length_end_where_they_do():
    """A long text would have its neighbours' tokens rotated as its own."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = hybrid(num_hidden_layers=2, rope_parameters=rope, max_position_embeddings=16)
    slots = Slots(model, 2, 64)
    with pytest.raises(LinearizeError, match="more than 16 tokens"):
        admitted(slots, prompt(17, 1))


def test_nothing_grows(monkeypatch):
    model = hybrid("llama", "all", LOLCATS, num_hidden_layers=2)
    slots = Slots(model, 3, 0, prompts=2)
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


@pytest.mark.parametrize("layers", ["all", [1], []], ids=["all", "hybrid", "teacher"])
def test_a_layer_with_a_recurrence_beside_its_attention_is_named(layers):
    """Also where every layer's attention is converted, which leaves no softmax layer to look at."""
    model = odd.model("falcon_h1", num_hidden_layers=2)
    if layers:
        model = surgery.convert(model, HEDGEHOG, layers)
    with pytest.raises(LinearizeError, match="beside their attention" if layers else "of the kind hybrid"):
        Slots(model, 2, 32)
    with pytest.raises(LinearizeError, match="cannot be decoded ahead"):
        Draft(model).check(model)
