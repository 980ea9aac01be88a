"""One step of many sequences of unequal length through a mixer: those of equal length together, each with its state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from linearize.mixers import Mixer
from linearize.serve.vllm.pages import load, store


@dataclass(frozen=True)
class Group:
    """Sequences that have the same number of new tokens.

    Attributes:
        tokens: [B, T] int64, where the tokens stand among all of the step.
        slots: [B] int64, the page of each sequence.
        fresh: [B] bool, whether it begins with these tokens.
    """

    tokens: Tensor
    slots: Tensor
    fresh: Tensor


def groups(starts: Sequence[int], slots: Tensor, lengths: Tensor) -> list[Group]:
    """The groups of one step, the shortest first; sequences without a new token are left out.

    Args:
        starts: [R + 1], on the host: where each sequence's tokens begin, and where the last one's end.
        slots: [R] integers.
        lengths: [R] integers, tokens of each sequence with the new ones.
    """
    by_length: dict[int, list[int]] = {}
    for row, (start, end) in enumerate(pairwise(starts)):
        if end > start:
            by_length.setdefault(end - start, []).append(row)
    made = []
    for length, rows in sorted(by_length.items()):
        index = torch.tensor(rows, device=slots.device)
        first = torch.tensor([starts[row] for row in rows], device=slots.device)
        tokens = first[:, None] + torch.arange(length, device=slots.device)
        made.append(Group(tokens, slots[index].long(), lengths[index] == length))
    return made


class Decodes:
    """The group of a step in which every sequence has one new token, always in the same memory.

    A CUDA graph reads what was there when it was captured, so numbers of later steps are copied to the same place.

    Args:
        rows: sequences at most.
        device: of the pages.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows = rows
        self.tokens = torch.arange(rows, device=device)[:, None]
        self.slots = torch.zeros(rows, dtype=torch.int64, device=device)
        self.fresh = torch.ones(rows, dtype=torch.bool, device=device)

    def fits(self, starts: Sequence[int]) -> bool:
        """Whether each sequence has one token, or none where sequences that pad a graph's rows stand at the end."""
        count, total = len(starts) - 1, starts[-1]
        return 0 < count <= self.rows and all(start == min(row, total) for row, start in enumerate(starts))

    def group(self, slots: Tensor, lengths: Tensor) -> Group:
        """The group of a step that `fits`; see `groups`. What pads has length 0, and reads and writes page 0.

        vLLM gives page 0 to nobody.
        """
        count = len(slots)
        self.slots[:count] = slots.clamp_min(0).masked_fill(lengths == 0, 0)
        self.fresh[:count] = lengths <= 1
        return Group(self.tokens[:count], self.slots[:count], self.fresh[:count])


def run(
    mixer: Mixer, inputs: dict[str, Tensor], found: Sequence[Group], views: dict[str, Tensor], out: Tensor
) -> None:
    """Run a mixer on the new tokens of a step, and bring the states in `views` forward.

    Args:
        mixer: of the layer.
        inputs: q [T, H, K], k [T, N, K], v [T, N, V], and where the mixer reads them hidden [T, D], plain_q, plain_k,
            first [T, N, V].
        found: see `groups`.
        views: see `Layout.views`.
        out: [T, H, V], written where a group has a token.
    """
    for group in found:
        given: dict[str, Any] = {name: x[group.tokens] for name, x in inputs.items()}
        if "plain_q" in given:
            given["plain"] = (given.pop("plain_q"), given.pop("plain_k"))
        state = load(views, group.slots, group.fresh)
        form = mixer.step if group.tokens.shape[1] == 1 else mixer.chunked
        made = form(**given, state=state)
        store(views, group.slots, state)
        out[group.tokens] = made.to(out.dtype)
