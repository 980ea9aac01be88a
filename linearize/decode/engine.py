"""Decoding in one CUDA graph: a model's one-token forward and the choice of the token, captured once, then replayed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

from linearize.decode.cache import tensors
from linearize.decode.compiling import Compiled
from linearize.decode.masks import Masks, token_masks
from linearize.decode.newest import attending, fits, newest_numbers
from linearize.decode.prefix import Prefix
from linearize.decode.reader import Reader
from linearize.decode.sampling import Sampling
from linearize.errors import LinearizeError
from linearize.recording import record

log = logging.getLogger(__name__)

BLOCK = 64
"""Tokens of each row that stay on the device until the host fetches them."""
WARM_UP = 3
"""Steps before the capture: kernels compile, libraries allocate."""


class Decoder(Reader):
    """A model with buffers for `batch` rows, ready to continue one batch of prompts after another.

    Prompts go through the model's ordinary chunked forward, which fills the buffers. Then one step follows another
    without the host knowing anything but how many: ids, positions, counters, states, the choice and who has finished
    live on the device. With all layers converted nothing depends on the length of the text; softmax layers, kept or run
    by a mixer (window `full`), hold `length` tokens.

    Args:
        model: a causal language model of transformers in evaluation mode, on one device.
        batch: rows.
        sampling: how tokens are chosen.
        eos: tokens that end a row.
        pad: what an ended row goes on with.
        length: most tokens, prompt included, if any layer is softmax.
        capture: capture a CUDA graph; without, the same steps run one by one (on any device).
        compile: options of `torch.compile` for the step, or None for the model's own operations.
        newest: kept softmax layers read the keys that a row sees by a kernel, where there is one for them; False: all
            that they hold, by transformers' own attention and a mask.

    Attributes:
        steps: one-token steps since the decoder was made, warm-up left out.
        obstacle: why the step runs as the model's own operations although it was to be compiled, or None.
    """

    goes_round = False
    """Whether the token behind the last place of softmax layers goes to their first."""

    def __init__(
        self,
        model: Any,
        batch: int,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        *,
        eos: Sequence[int] = (),
        pad: int = 0,
        length: int = 0,
        capture: bool = True,
        compile: dict[str, Any] | None = None,  # noqa: A002 - torch's name
        newest: bool = True,
    ) -> None:
        super().__init__(model, batch, length)
        self.sampling = sampling
        self.steps = 0

        def whole(*size: int, fill: Any = 0, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full(size, fill, dtype=dtype, device=self.device)

        self.tokens = whole(batch, 1)
        self.finished = whole(batch, fill=False, dtype=torch.bool)
        self.recent, self.column = whole(batch, BLOCK), whole(1)
        self.eos = torch.tensor(list(eos), dtype=torch.int64, device=self.device)
        self.pad = whole(fill=pad)
        self.compiled = None if compile is None else Compiled(self._eager_step, compile, "the step")
        self._step: Callable[[], None] = self.compiled or self._eager_step
        self._graph: torch.cuda.CUDAGraph | None = None
        self._capturing = capture
        self._ready = False
        self._newest = newest and self.keeps_softmax and fits(model, self.config)

    @property
    def obstacle(self) -> str | None:
        """See above."""
        return None if self.compiled is None else self.compiled.obstacle

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        mask: Tensor | None,
        tokens: int,
        *,
        on_tokens: Callable[[Tensor], None] | None = None,
        every: int = 16,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """Continue prompts, each from an empty state or from that of one text.

        Args:
            ids: [B, T] int64, padded on the left.
            mask: [B, T], 0 on padding, or None.
            tokens: most new tokens.
            on_tokens: called with each block [B, n] on the CPU, as soon as it has been fetched.
            every: tokens between two looks of the host at what has been made: up to `every - 1` steps behind the end of
                the last row are made in vain, and cut off. At most BLOCK.
            prefix: what every row has read before its prompt; prompts have no padding then.

        Returns:
            New tokens [B, n] on the device, n where the last row ended or `tokens`; ended rows go on with `pad`.
        """
        if ids.shape[0] != self.batch:
            raise LinearizeError(f"{ids.shape[0]} prompts for a decoder of {self.batch} rows")
        total = ids.shape[1] + tokens + (0 if prefix is None else prefix.tokens)
        if self.holds_tokens and total > self.length:
            raise LinearizeError(f"{total} tokens for a decoder whose softmax layers hold {self.length}")
        self.prepare()
        if tokens < 1:
            return ids[:, :0]
        self.read(ids, mask, prefix)
        ended, ends = torch.zeros(self.batch, 1, dtype=torch.bool), self.eos.cpu()
        blocks: list[Tensor] = []
        fresh, made = 1, 1
        while True:
            block = self._fetch(made, fresh)
            over = ended | (torch.isin(block, ends).cumsum(1) > 0)
            ended, all_over = over[:, -1:], over.all(0)
            if bool(all_over.any()):
                block = block[:, : int(all_over.int().argmax()) + 1]
            blocks.append(block)
            if on_tokens is not None:
                on_tokens(block)
            if bool(all_over.any()) or made >= tokens:
                return torch.cat(blocks, 1).to(self.device)
            fresh = min(every, BLOCK, tokens - made)
            self.run(fresh)
            made += fresh

    @torch.no_grad()
    def prepare(self) -> None:
        """Make the states with a few steps of nothing, and capture, at the first call; the generator stays as it was.

        Raises:
            LinearizeError: a state is not written in place.
            RuntimeError: an operation of the model cannot be captured.
        """
        if self._ready:
            return
        try:
            self._make()
        except (LinearizeError, RuntimeError):
            # a family may want a mask where it is given numbers, or have scores that are not known here
            if not self._newest:
                raise
            log.debug("kept softmax layers are given masks", exc_info=True)
            self._newest = False
            self._make()
        self._ready = True

    def _make(self) -> None:
        """The states and the step, by what is known of the softmax layers."""
        self._reset()
        self.clock.start(0)
        captures = self.device.type == "cuda" and self._capturing
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []), self._decoding():
            if captures:
                self._capture()
            else:
                self._twice()

    @torch.no_grad()
    def read(self, ids: Tensor, mask: Tensor | None, prefix: Prefix | None = None) -> None:
        """Forget everything, read the prompts [B, T] in chunked form, and choose each row's first new token.

        Args:
            ids, mask, prefix: see `generate`.

        Raises:
            LinearizeError: padding behind a prefix.
        """
        if self._newest and mask is not None and bool((mask[:, 1:] < mask[:, :-1]).any()):
            # keys that are seen do not lie side by side then: only a mask can say which they are
            self._newest = False
            if self._ready:
                self._make()
        if self.compiled is not None:
            self.compiled.refresh()
        self._reset()
        self._take(self.fill(ids, mask, prefix))

    @torch.no_grad()
    def run(self, steps: int) -> None:
        """So many tokens more for every row; the host waits for nothing.

        Raises:
            LinearizeError: softmax layers have no room for their keys.
        """
        expected = self.clock.expected + steps
        if self.length and expected > self.length and not self.goes_round:
            # beyond, a device would stop with an assertion of its own, and everything else on it
            raise LinearizeError(
                f"{expected:,} tokens for a decoder whose softmax layers hold {self.length:,}; make it with a longer "
                "`length`"
            )
        self.clock.expected = expected
        with nullcontext() if self._graph is not None else self._decoding():
            for _ in range(steps):
                if self._graph is None:
                    self._step()
                else:
                    self._graph.replay()
        self.steps += steps

    def _decoding(self) -> AbstractContextManager[Any]:
        """The same with softmax layers that are told how many keys are seen, where they can be."""
        stack = ExitStack()
        stack.enter_context(super()._decoding())
        if self._newest:
            stack.enter_context(attending(self.config))
        return stack

    def _eager_step(self) -> None:
        masks: Masks = self._no_masks
        if self._newest:
            masks = newest_numbers(self.config, self.clock.tokens, self.positions + 1)
        elif self.keeps_softmax:
            masks = token_masks(self.config, self.seen, self.clock.tokens, self.dtype)
        logits = self._forward(self.tokens, self.positions, attention_mask=masks)
        self.clock.tokens.add_(1)
        self.positions.add_(1)
        self._take(logits)

    def _take(self, logits: Tensor) -> None:
        """Choose from logits [B, V] and write down what was chosen."""
        chosen = torch.where(self.finished, self.pad, self.sampling.choose(logits))
        self.finished.logical_or_((chosen[:, None] == self.eos).any(1))
        self.tokens.copy_(chosen[:, None])
        self.recent.index_copy_(1, self.column, chosen[:, None])
        self.column.copy_((self.column + 1) % BLOCK)

    def _fetch(self, made: int, fresh: int) -> Tensor:
        """The last `fresh` of `made` columns, on the CPU; waits for them."""
        places = torch.arange(made - fresh, made, device=self.device) % BLOCK
        return self.recent[:, places].cpu()

    def _reset(self) -> None:
        self.forget()
        self.finished.zero_()
        self.column.zero_()

    def _twice(self) -> None:
        """Two steps; the first, never compiled, makes the states, the second must leave every tensor where it is."""
        self._eager_step()
        before = {name: x.data_ptr() for name, x in tensors(self.cache).items()}
        self._step()
        moved = [name for name, x in tensors(self.cache).items() if before.get(name) != x.data_ptr()]
        if moved:
            raise LinearizeError(
                f"states that are not written in place cannot be replayed: {', '.join(moved[:3])}"
            )

    def _capture(self) -> None:
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._twice()
                for _ in range(WARM_UP - 2):
                    self._step()
            torch.cuda.current_stream().wait_stream(side)
            self._graph, _ = record(self._step)
