"""A mixer's state as bytes of a page: vLLM hands out pages of one size, and layers may have different mixers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.mixers import Mixer, State

ALIGNED = 16
"""Every tensor, and every page, begins at a multiple of so many bytes, which is the widest load of a GPU."""


@dataclass(frozen=True)
class Place:
    """Where a tensor of a state stands in a page.

    Attributes:
        start: first byte.
        shape: of one sequence, without the batch.
        dtype: sums and normalizers float32, keys and values as the model computes.
    """

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """How a mixer's state fills a page.

    Attributes:
        places: by name, as `Mixer.initial_state` names them.
        bytes: of the page, a multiple of `ALIGNED`.
    """

    places: dict[str, Place]
    bytes: int

    @classmethod
    def of(cls, mixer: Mixer, dtype: torch.dtype) -> Layout:
        """Of a mixer in a model that computes in `dtype`."""
        end, places = 0, {}
        for name, tensor in mixer.initial_state(1, dtype, torch.device("meta")).tensors.items():
            places[name] = Place(end, tuple(tensor.shape[1:]), tensor.dtype)
            end += -(-places[name].bytes // ALIGNED) * ALIGNED
        return cls(places, end)

    def views(self, pages: Tensor) -> dict[str, Tensor]:
        """The tensors [P, ...] of every page [P, bytes] uint8, sharing its memory."""
        views = {}
        for name, place in self.places.items():
            cut = pages[:, place.start : place.start + place.bytes].view(place.dtype)
            views[name] = cut.unflatten(1, place.shape) if place.shape else cut[:, 0]
        return views


def load(views: dict[str, Tensor], slots: Tensor, fresh: Tensor) -> State:
    """The states of some sequences, as copies.

    Args:
        views: of all pages, see `Layout.views`.
        slots: [B] int64, the page of each sequence.
        fresh: [B] bool, true for a sequence that begins: whatever its page held before is another's.
    """
    held = {}
    for name, view in views.items():
        taken = view.index_select(0, slots)
        # not a product: what was there may be no number
        held[name] = taken.masked_fill_(fresh.view(-1, *[1] * (taken.dim() - 1)), 0)
    return State(held)


def store(views: dict[str, Tensor], slots: Tensor, state: State) -> None:
    """Write states back to the pages of their sequences; see `load`."""
    for name, view in views.items():
        view.index_copy_(0, slots, state[name])
