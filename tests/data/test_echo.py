"""Rows in which passages come again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from linearize.config import compose
from linearize.data.echo import LEAST, SHORTEST, Echoed, echoed
from linearize.data.packing import IGNORED, LOSS, START, PackedDataset
from linearize.errors import RecipeError

LENGTH = 256


def rows(starts: tuple[int, ...] = (0,), untrained: slice = slice(0, 0)) -> PackedDataset:
    """40 rows of tokens none of which comes twice."""
    tokens = np.arange(40 * LENGTH, dtype=np.int32)
    flags = np.full(len(tokens), LOSS, dtype=np.uint8)
    for row in range(40):
        for start in starts:
            flags[row * LENGTH + start] |= START
        flags[row * LENGTH :][untrained] = 0
    return PackedDataset(tokens, flags, length=LENGTH, boundaries=True)


def copies(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[int]:
    return (before["input_ids"] != after["input_ids"]).nonzero().flatten().tolist()


def test_every_changed_token_stands_earlier_in_the_same_document() -> None:
    plain = rows((0, 30, 200))
    made = Echoed(plain, share=1.0, seed=1)
    shares = []
    for index in range(len(made)):
        before, after = plain[index], made[index]
        assert torch.equal(before["position_ids"], after["position_ids"])
        ids, changed = after["input_ids"].tolist(), copies(before, after)
        assert all(30 <= place < 200 and ids[place] in ids[30:place] for place in changed)
        shares.append(len(changed) / 170)
        follows = [place for place in changed if ids[place] == ids[place - 1] + 1]
        assert len(follows) >= len(changed) * (SHORTEST - 2) / SHORTEST - 1  # passages, not single tokens
    assert 0.15 < sum(shares) / len(shares) < 0.5 and min(shares) > 0


def test_labels_follow_but_for_the_token_that_a_copy_begins_with() -> None:
    plain = rows(untrained=slice(50, 90))
    made = Echoed(plain, share=1.0, seed=2)
    for index in range(len(made)):
        before, after = plain[index], made[index]
        trained = after["labels"] != IGNORED
        assert torch.equal(after["labels"][trained], after["input_ids"][trained])
        assert not trained[50:90].any() and not trained[0]
        lost = ((before["labels"] != IGNORED) & ~trained).nonzero().flatten().tolist()
        assert lost and set(lost) <= set(copies(before, after))


def test_rows_and_draws_are_fixed_by_seed_and_number() -> None:
    plain = rows()
    made, again, other = (Echoed(plain, share=0.5, seed=seed) for seed in (3, 3, 4))
    changed = [bool(copies(plain[index], made[index])) for index in range(len(plain))]
    assert 8 < sum(changed) < 32
    for index in reversed(range(len(plain))):
        assert torch.equal(made[index]["input_ids"], again[index]["input_ids"])
    assert any(not torch.equal(made[index]["input_ids"], other[index]["input_ids"]) for index in range(40))
    assert made.num_tokens == plain.num_tokens and len(made) == len(plain)


@pytest.mark.parametrize("length", [1, 2, LEAST - 1, LEAST])
def test_short_documents_stay(length: int) -> None:
    ids = torch.arange(length)
    item = {"input_ids": ids, "position_ids": torch.arange(length), "labels": ids}
    for seed in range(20):
        after = echoed(item, np.random.default_rng(seed))
        assert torch.equal(item["input_ids"], ids)
        if length < LEAST:
            assert torch.equal(after["input_ids"], ids)


def test_shares_that_are_none_and_pairs_are_refused() -> None:
    for value in ("1.5", "-0.1", "often"):
        with pytest.raises(RecipeError, match=r"data\.echo"):
            compose("lolcats", [f"data.echo={value}"])
    with pytest.raises(RecipeError, match=r"pairs of answers are read as they are"):
        compose("mamba_in_llama_dpo", ["stages.dpo.data.echo=0.5"])
