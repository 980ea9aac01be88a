"""Pinned first tokens seen from far away: no further than from where queries know how to look at them.

A pinned token keeps its position while the text goes on, so that its distance grows without end. Behind the longest
text of the teacher its rotary embedding turns it to angles that nothing was trained at, and the sink that the other
scores rest on is gone. StreamingLLM (Xiao et al. 2023, arXiv 2309.17453, section 3.2) numbers positions within the
cache instead. Here distances stay the text's own up to a length that the teacher knows well and that conversions are
trained at, and stop there: the query that looks at pinned keys is turned back by what is more.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from linearize.kernels.window import NOWHERE, Seen
from linearize.kernels.window.turned import turned_back
from linearize.mixers.window.runs import Line
from linearize.mixers.window.softmax import Asked


class Far:
    """How far away pinned tokens may seem.

    Args:
        turns: see `LayerShape`.
        most: tokens from which a pinned one seems no further away.

    A query with more tokens of its document before it is turned back by what is more.
    """

    def __init__(self, turns: tuple[float, ...], most: int) -> None:
        self.turns, self.most = turns, most
        self._tables: dict[torch.device, Tensor] = {}

    def table(self, device: torch.device) -> Tensor:
        """Radians a token [R / 2], float64; made before anything is captured in a graph, see `RingWindow.initial`."""
        if device not in self._tables:
            self._tables[device] = torch.tensor(self.turns, dtype=torch.float64, device=device)
        return self._tables[device]

    def turned_back(self, q: Tensor, count: Tensor) -> Tensor:
        """q [B, T, H, K], rotated to its place, as it looks at pinned keys.

        Args:
            count: [B or 1, T] tokens of the query's document before it.
        """
        return turned_back(q, (count - self.most).clamp_min(0), self.table(q.device))

    def parted(self, q: Tensor, seen: Seen, sink: Tensor | None, count: Tensor) -> list[Asked]:
        """What queries see as they are, and the pinned keys that those far away see turned back.

        Args:
            q: [B, T, H, K].
            seen: with `first` and `pin`.
            sink: see `Asked`.
            count: [B, T], see `turned_back`.
        """
        assert seen.first is not None and seen.pin is not None
        far = count > self.most
        own = torch.arange(seen.prefix, seen.prefix + count.shape[1], device=count.device)
        behind = torch.where(seen.first == NOWHERE, NOWHERE, own + 1).to(torch.int32)
        near = replace(seen, pin=torch.where(far, NOWHERE, seen.pin).to(torch.int32))
        # kernels know by a pinned token's own query that it is pinned, so no query's pins are taken away here
        pinned = replace(seen, window=1, first=behind)
        return [Asked(q, near, sink), Asked(self.turned_back(q, count), pinned, only=far)]

    @staticmethod
    def counts(line: Line, pinned: Tensor, since: Tensor | None) -> Tensor:
        """Tokens of each query's document before it, [B, T].

        Args:
            line: the keys of the call.
            pinned: [B, T], see `Line.pinned_from`.
            since: [B] tokens that document 0 has had in the calls before, or None where nothing has been carried.
        """
        place = torch.arange(line.prefix, line.valid.shape[1], device=pinned.device)
        count = place - pinned
        if since is None:
            return count
        front = torch.zeros_like(since) if line.front is None else line.front
        goes_on = (pinned < line.prefix + front[:, None]) & (since > 0)[:, None]
        return torch.where(goes_on, place - line.prefix + (since - front)[:, None], count)
