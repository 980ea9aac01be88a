"""Multi-query associative recall, by Zoology's definition (Arora et al. 2023, arXiv 2312.04927, section 4).

K keys and values stand first, ``k1 v1 k2 v2 ...``; then each key is asked for once, at a gap drawn from a power law,
and the model is to predict its value at the key's own position. The value is never shown there. What is not part of
this is noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from linearize.errors import DataError

POWER = 0.01
"""a of the gaps' law: p(i) ~ a i^(a - 1), so that most queries come soon."""
VOCABULARY = 8192
UNLABELLED = -100


@dataclass(frozen=True)
class Recall:
    """Examples.

    Attributes:
        inputs: int64 [N, L] numbers below the vocabulary.
        labels: int64 [N, L], the value at each query's position, `UNLABELLED` elsewhere.
        distances: int64 [N, L], tokens from the query back to its key, 0 elsewhere.
    """

    inputs: Any
    labels: Any
    distances: Any


def mqar(
    seed: int, examples: int, length: int, pairs: int, *, vocabulary: int = VOCABULARY, noise: bool = True
) -> Recall:
    """Zoology's examples.

    Args:
        seed: of all random numbers.
        examples: N.
        length: L, even.
        pairs: K, with 4K <= L.
        vocabulary: V; keys are of 1 to V/2 - 1, values of V/2 to V - 1.
        noise: fill what is left with uniform tokens; false leaves zeros.

    Raises:
        DataError: the pairs do not fit into the length or the vocabulary.
    """
    if length % 2 or pairs < 1 or 4 * pairs > length or pairs >= vocabulary // 2:
        raise DataError(
            f"mqar: {pairs} pairs in {length} tokens of {vocabulary} symbols: the length must be even and hold four "
            "tokens a pair, of at least one, and there must be a symbol for each key"
        )
    random = np.random.default_rng(seed)
    context, half = 2 * pairs, vocabulary // 2
    inputs = np.zeros((examples, length), np.int64)
    labels, distances = np.full_like(inputs, UNLABELLED), np.zeros_like(inputs)
    space = (length - context) // 2
    law = POWER * np.arange(1, space + 1, dtype=np.float64) ** (POWER - 1)
    law /= law.sum()
    for row in range(examples):
        keys = random.choice(np.arange(1, half), pairs, replace=False)
        values = random.choice(np.arange(half, vocabulary), pairs, replace=False)
        inputs[row, 0:context:2], inputs[row, 1:context:2] = keys, values
        places = context + 2 * random.choice(space, pairs, replace=False, p=law)
        inputs[row, places], labels[row, places] = keys, values
        distances[row, places] = places - 2 * np.arange(pairs)
    if noise:
        blank = inputs == 0
        inputs[blank] = random.integers(vocabulary, size=int(blank.sum()))
    return Recall(inputs, labels, distances)


def symbols(tokenizer: Any, most: int = VOCABULARY) -> Any:
    """Ids of tokens that stand for the numbers: whole words in lower case where there are enough, else any.

    Args:
        tokenizer: of transformers.
        most: how many at most.

    Returns:
        int64 [V], V even, in the order of the ids.
    """
    special = set(tokenizer.all_special_ids)
    plain = [
        (token, text)
        for text, token in tokenizer.get_vocab().items()
        if token not in special and text not in tokenizer.get_added_vocab()
    ]
    words = sorted(token for token, text in plain if text[:1] in "Ġ▁" and text[1:].isascii() and text[1:].islower()
                   and text[1:].isalpha() and len(text) > 3)  # fmt: skip
    chosen = words if len(words) >= 64 else sorted(token for token, _ in plain)
    count = min(most, len(chosen)) // 2 * 2
    step = len(chosen) / count
    return np.array([chosen[int(i * step)] for i in range(count)], np.int64)
