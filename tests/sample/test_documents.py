"""Which documents are kept."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq

from linearize.data import builtin
from linearize.sample.documents import BEGINNING, FEWEST, Filter, Written, documents
from linearize.sample.loops import loops
from linearize.sample.writer import ENDED, START


def written(ids, given: int = 2) -> Written:
    return Written(np.asarray(ids, dtype=np.int64), 0, given, ended=True)


def random_ids(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1000, size=n).tolist()


def test_a_round_is_cut_where_documents_start():
    row = np.array([5 + START, 6, 7, 5 + START + ENDED, 9, 8 + START], np.int32)
    found = list(documents(row[None], np.array([[1, 0]]), np.array([1, 2])))
    assert [document.ids.tolist() for document in found] == [[5, 6, 7], [5, 9], [8]]
    assert [document.opening for document in found] == [1, 0, 1]
    assert [document.given for document in found] == [2, 1, 2]
    assert [document.ended for document in found] == [True, False, False], (
        "the second was cut, the last is open"
    )


def test_loops_are_found_wherever_they_are():
    text = random_ids(400)
    assert not loops(np.array(text))
    for period in (1, 2, 7, 30, 80):
        loop = random_ids(period, seed=1) * (200 // period + 1)
        assert loops(np.array(text[:200] + loop[:200])), period
        assert loops(np.array(loop[:200] + text[:200])), period
    assert loops(np.array([3] * 20)) and not loops(np.array([3] * 5))
    assert not loops(np.array(text[:150] + text[150:170] * 2 + text[170:])), "a sentence said twice is none"


def test_text_that_people_wrote_is_no_loop():
    """Of the package's held-out books, a word a token."""
    texts = pq.read_table(builtin.sample("validation"))["text"].to_pylist()
    words = [text.split() for text in texts]
    numbers = {word: index for index, word in enumerate({word for some in words for word in some})}
    pieces = [
        np.array([numbers[word] for word in some[start : start + 600]])
        for some in words
        for start in range(0, len(some) - 600, 600)
    ]
    assert len(pieces) > 50 and sum(loops(piece) for piece in pieces) <= 1


def test_verdicts():
    sift = Filter(set())
    text = random_ids(200)
    assert sift.verdict(written(text[: FEWEST + 1])) == "short"
    assert sift.verdict(written(text[: FEWEST + 2])) is None
    assert sift.verdict(written(text)) is None
    assert sift.verdict(written([*text[:BEGINNING], *random_ids(100, 5)])) == "duplicate"
    assert sift.verdict(written([9, *text[1:]])) is None
    assert sift.verdict(written([1] * 100)) == "loop"
    assert sift.verdict(written([1] * 100)) == "loop", "what was dropped is not known"
