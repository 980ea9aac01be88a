"""Sampled text has the model's own distribution whatever drafts: held against every text's chance, enumerated."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch
from decoding import hybrid

from linearize import surgery
from linearize.decode import Sampling
from linearize.decode.acceptance import accept_greedy, accept_sampled
from linearize.decode.speculator import Speculator

WORDS, NEW, ROWS = 5, 3, 2000
SETTINGS = {
    "plain": Sampling(True),
    "warm": Sampling(True, 1.7),
    "top_k": Sampling(True, 0.8, 3),
    "top_p": Sampling(True, 1.0, 0, 0.7),
}


def small(seed: int):
    """Two layers over five tokens, of which one was converted; quite another model for another seed."""
    sizes = {
        "vocab_size": WORDS,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    model = surgery.convert(tiny.model(seed=seed, **sizes), tiny.LOLCATS, [seed % 2])
    tiny.randomize((layer.mixer for layer in surgery.converted(model)), seed)
    return model


@torch.no_grad()
def chances(model, prompt, sampling: Sampling) -> torch.Tensor:
    """Chance of each of the WORDS ** NEW texts behind a prompt [1, T], by one forward over all of them."""
    texts = torch.tensor(list(itertools.product(range(WORDS), repeat=NEW)))
    whole = torch.cat([prompt.expand(len(texts), -1), texts], 1)
    logits = model(whole).logits[:, prompt.shape[1] - 1 : -1]
    each = sampling.probabilities(logits.flatten(0, 1)).unflatten(0, texts.shape)
    return each.gather(-1, texts[..., None])[..., 0].double().prod(1)


def misfit(found: torch.Tensor, chance: torch.Tensor) -> float:
    """How many standard deviations chi-square stands above its mean; texts expected fewer than five times are one."""
    count = torch.bincount(found, minlength=len(chance)).double()
    assert not count[chance == 0].any(), "a text that has no chance"
    expected = chance * len(found)
    rare = expected < 5
    count, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (count, expected))
    count, expected = count[expected > 0], expected[expected > 0]
    degrees = len(count) - 1
    return float((((count - expected) ** 2 / expected).sum() - degrees) / (2 * degrees) ** 0.5)


def drawn(model, draft, sampling: Sampling, ahead: int, batches: int = 2) -> tuple[torch.Tensor, float]:
    """Numbers of the texts that many equal rows draw, and the share of drafted tokens that was taken."""
    prompt = torch.tensor([[3, 2, 4, 2, 3]])
    made = Speculator(model, draft, ROWS, ahead, sampling, length=5 + NEW, tokens=NEW)
    torch.manual_seed(ahead)
    texts = [made.generate(prompt.expand(ROWS, -1), None, NEW) for _ in range(batches)]
    powers = WORDS ** torch.arange(NEW - 1, -1, -1)
    return (torch.cat(texts) * powers).sum(1), float(made.accepted.sum() / (made.rounds.sum() * ahead))


@pytest.mark.parametrize(("name", "ahead"), [("plain", 2), ("warm", 1), ("top_k", 5), ("top_p", 2)])
def test_texts_come_as_often_as_the_model_would_write_them(name, ahead):
    sampling = SETTINGS[name]
    model, draft = small(0), small(1)
    chance = chances(model, torch.tensor([[3, 2, 4, 2, 3]]), sampling)
    assert abs(float(chance.sum()) - 1) < 1e-5
    found, share = drawn(model, draft, sampling, ahead)
    assert misfit(found, chance) < 4
    assert 0.05 < share < 0.95, "the draft is another model, so that the rule has something to do"


def test_a_rule_that_is_wrong_shows(monkeypatch):
    """Taking all that is drafted, or drawing the next one from the model's chances without what was refused."""
    from linearize.decode import speculator

    model, draft, sampling = small(0), small(1), Sampling(True)
    chance = chances(model, torch.tensor([[3, 2, 4, 2, 3]]), sampling)

    def all_taken(drafted, proposed, wanted):
        return accept_sampled(drafted, proposed, wanted.scatter(-1, drafted_behind(drafted), 1e9))

    def drafted_behind(drafted):
        return torch.cat([drafted, drafted[:, -1:]], 1)[..., None]

    def not_taken_out(drafted, proposed, wanted):
        tokens, agreed = accept_sampled(drafted, proposed, wanted)
        own = torch.multinomial(wanted.flatten(0, 1), 1).view(drafted.shape[0], -1)
        place = agreed[:, None]
        return tokens.scatter(1, place, own.gather(1, place)), agreed

    for wrong in (all_taken, not_taken_out):
        monkeypatch.setattr(speculator, "accept_sampled", wrong)
        assert misfit(drawn(model, draft, sampling, 2)[0], chance) > 8


def test_a_token_has_the_models_chance_whatever_is_proposed():
    """One place, all kinds of pairs: equal, apart, one that proposes what the model never says."""
    torch.manual_seed(0)
    rows = 40_000
    for p, q in [
        ([0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]),
        ([0.25, 0.25, 0.25, 0.25], [0.25, 0.25, 0.25, 0.25]),
        ([0.0, 0.5, 0.5, 0.0], [0.9, 0.05, 0.0, 0.05]),
        ([1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]),
    ]:
        wanted, proposed = (torch.tensor(x).expand(rows, 1, 4) for x in (p, q))
        drafted = torch.multinomial(proposed[:, 0], 1)
        behind = torch.tensor([0.7, 0.1, 0.1, 0.1]).expand(rows, 1, 4)
        tokens, agreed = accept_sampled(drafted, proposed, torch.cat([wanted, behind], 1))
        share = torch.tensor([min(a, b) for a, b in zip(p, q, strict=True)]).sum()
        assert abs(float(agreed.double().mean() - share)) < 0.01
        first = tokens[:, 0].bincount(minlength=4) / rows
        torch.testing.assert_close(first, torch.tensor(p), atol=0.01, rtol=0)
        taken = tokens[agreed == 1, 1]
        if len(taken) > 1000:
            next_one = taken.bincount(minlength=4) / len(taken)
            torch.testing.assert_close(next_one, torch.tensor([0.7, 0.1, 0.1, 0.1]), atol=0.02, rtol=0)


def test_greedy_takes_up_to_the_first_that_differs():
    scores = torch.nn.functional.one_hot(torch.tensor([[2, 0, 1, 3], [2, 0, 1, 3], [2, 0, 1, 3]]), 4).float()
    drafted = torch.tensor([[2, 0, 1], [2, 3, 1], [0, 0, 1]])
    tokens, agreed = accept_greedy(drafted, scores)
    assert agreed.tolist() == [3, 1, 0] and tokens[0].tolist() == [2, 0, 1, 3]


def test_the_same_seed_gives_the_same_text():
    model, draft = hybrid(), hybrid("llama", [1])
    made = Speculator(model, draft, 2, 3, Sampling(True), length=30, tokens=12)
    ids = tiny.tokens(2, 9)
    texts = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        texts.append(made.generate(ids, None, 12))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
