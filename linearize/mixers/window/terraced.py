"""Terraced softmax (LoLCATs' `tk` geometry, arXiv 2410.10254, section 3.3): the own block and the one before it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from linearize.kernels.window_linear.recurrent import Ring
from linearize.mixers.base import LayerShape, positions
from linearize.mixers.options import LONGEST, number
from linearize.mixers.state import State
from linearize.mixers.window import WINDOWS
from linearize.mixers.window.handed import Handed, Order
from linearize.mixers.window.ring import RingWindow


@WINDOWS.register("terraced")
class TerracedWindow(RingWindow):
    """A query sees the whole previous block of `size` tokens and its own block up to itself: size + 1 to 2 size keys.

    When a block begins, the block before the previous one is handed on as a whole, before the first query reads.
    Blocks are counted from the first valid token of each document, so an output never depends on what follows, and
    the one-token form is the training form. In LoLCATs' code blocks are aligned to the end of the text and decoding
    keeps the last `size` keys only, two other functions than the one that was trained. `first`, `sinks` and `overlap`
    are those of `sliding`. In a layer whose teacher slides, no key is seen that the teacher would not see.

    Limitations: the recurrent branch runs over 2 T + size slots in the chunked form, twice those of `sliding`. On a GPU
    the torch one-token form maps a block's keys at every token, since asking the device whether a block begins would
    stall it; `window_linear_step` asks on the device.
    """

    @dataclass
    class Config(RingWindow.Config):
        size: int = number(64, least=1, most=LONGEST)
        """Tokens in a block."""

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape, size=config.size, span=2 * config.size)

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        # once for each head, as `window_next` is
        count = torch.zeros(batch, self.shape.heads, dtype=torch.int64, device=device)
        return super().initial(batch, dtype, device) | {"window_position": count}

    has_reach = True

    @property
    def least(self) -> int:
        return self.size + 1

    def ring(self, state: State) -> Ring:
        return replace(super().ring(state), position=state["window_position"], block=self.size)

    def stays(self, visible: Tensor, age: Tensor) -> Tensor:
        own = age[:, :1]  # of the text's first token: the query's place in the text
        opens = visible.to(torch.int8).argmax(-1)
        position = own.T - opens
        return visible & (age < self._terrace(position)[..., None])

    def positions(self, valid: Tensor, docs: Tensor, state: State) -> Tensor:
        before = state["window_position"][:, :1].clone()
        ring = before + torch.arange(-self.span, 0, device=valid.device)
        new, count = positions(valid, docs, before[:, 0])
        state.write({"window_position": count[:, None].expand(-1, self.shape.heads)})
        return torch.cat([ring, new.clamp_min(0)], 1)

    def reach(self, position: Tensor | None) -> Tensor:
        assert position is not None
        return self._terrace(position).clamp(max=self.limit or self.span)

    def leaving(self, k: Tensor, v: Tensor, valid: Tensor, docs: Tensor, position: Tensor | None) -> Handed:
        """Keys in the text's order, each before the query at whose turn its block is the last but one (`due`)."""
        assert position is not None
        size, tokens = self.size, k.shape[1] - self.span
        keys = tokens + size - 1  # later ones are not due in this call
        k, v, valid, position = k[:, :keys], v[:, :keys], valid[:, :keys], position[:, :keys]
        place = torch.arange(keys, device=k.device)
        due = place - position % size  # the key of query t stands at t + 2 size; negative: handed on before
        turn = due.clamp(0, tokens - 1)
        new_docs = docs[:, self.span :]
        due_docs = new_docs.gather(1, turn)
        valid = valid & (due >= 0) & (due < tokens) & (docs[:, :keys] == due_docs)
        time = torch.arange(tokens, device=k.device)
        added = torch.searchsorted(due, time.expand(k.shape[0], -1).contiguous(), right=True)
        order = Order(place + due.clamp(0, tokens), time + added, docs.new_zeros(k.shape[0], keys + tokens))
        order.docs = order.place_keys(due_docs) + order.place_queries(new_docs)
        return Handed(k, v, valid, position=position, order=order)

    def leaving_step(
        self, k: Tensor, v: Tensor, valid: Tensor, oldest: Tensor, position: Tensor | None
    ) -> Handed:
        assert position is not None
        begins = position % self.size == 0
        if k.device.type == "cpu" and not torch.compiler.is_compiling() and not begins.any():
            return Handed(k[:, :0], v[:, :0], valid[:, :0], position=position[:, :0])
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        block = torch.arange(self.size, device=k.device)
        slots = (oldest[:, None] + block) % self.slots
        old = position - self.span + block
        return Handed(k[rows, slots], v[rows, slots], valid[rows, slots] & begins, position=old)

    def _terrace(self, position: Tensor) -> Tensor:
        """Tokens from the start of the previous block to a query at `position`."""
        return self.size + position % self.size + 1
