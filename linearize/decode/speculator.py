"""Speculative decoding: a second model drafts some tokens, one launch of the first checks them all.

A round drafts, checks, takes what may be taken, and takes both models' states back to it; all of that on the device, so
that a round is one CUDA graph. The draft's state is kept one token behind the text: its round begins with the text's
last two tokens in one launch, whether or not it has seen the last but one, and its states, like the checking model's,
advance by as many tokens as were taken, and one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from linearize.decode.acceptance import accept_greedy, accept_sampled
from linearize.decode.ahead import Ahead
from linearize.decode.cache import tensors
from linearize.decode.compiling import Compiled
from linearize.decode.prefix import Prefix
from linearize.decode.sampling import Sampling, draw
from linearize.errors import LinearizeError
from linearize.recording import record

log = logging.getLogger(__name__)


class Speculator:
    """A model and a draft with buffers for `batch` rows, ready to continue one batch of prompts after another.

    Args:
        model: whose text it is: a causal language model of transformers in evaluation mode, on one device.
        draft: likewise, on the same device, with the same tokens.
        batch: rows.
        ahead: tokens drafted in a round, at least 1.
        sampling: how tokens are chosen.
        eos: tokens that end a row.
        pad: what an ended row goes on with.
        length: most tokens, prompt included, that softmax layers of either model hold.
        tokens: most new tokens.
        capture: capture a CUDA graph where there is CUDA; without, the same rounds run operation by operation.
        compile: options of `torch.compile` for the forwards of a round, or None for the models' own operations.

    Attributes:
        rounds, accepted: [B] int64, of the last text: rounds until the row ended, and drafted tokens taken in them.
        seconds: from its first new token to its last.
        graph: the graph of a round, or None.
        obstacle: why they are not, although they were to be captured, or why a forward is not compiled although it was
            to be; or None.
    """

    def __init__(
        self,
        model: Any,
        draft: Any,
        batch: int,
        ahead: int,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        *,
        eos: Sequence[int] = (),
        pad: int = 0,
        length: int = 0,
        tokens: int = 1,
        capture: bool = True,
        compile: dict[str, Any] | None = None,  # noqa: A002 - torch's name
    ) -> None:
        self.batch, self.ahead, self.sampling, self.most = batch, ahead, sampling, tokens
        # a row's last round may end behind its text, and rounds go ahead from there while other rows run
        room = length + 2 * (ahead + 1)
        self.model, self.draft = Ahead(model, batch, room), Ahead(draft, batch, room, singly=ahead + 1)
        self.draft.clock.room = self.model.room  # both are made before either is written to
        self.length, self.device, self.pad = length, self.model.device, pad
        self.holds_tokens = self.model.holds_tokens or self.draft.holds_tokens
        self.known = draft.get_input_embeddings().weight.shape[0]
        """Tokens that the draft has: its table may have fewer or more rows behind those of the tokenizer."""

        def whole(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=self.device)

        self.pair, self.made, self.limit = whole(batch, 2), whole(batch), whole()
        self.written = whole(batch, tokens + ahead + 1)
        self.finished, self.sound = whole(batch, dtype=torch.bool), whole(dtype=torch.bool)
        self.rounds, self.accepted = whole(batch), whole(batch)
        self.width = 0  # of the model's logits
        self.seconds = 0.0
        self.eos = torch.tensor(list(eos), dtype=torch.int64, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.looks = True
        """Whether rounds without a graph may wait for the device; a test that they need not takes it away."""
        self.obstacle: str | None = None
        self._captures = capture and self.device.type == "cuda"
        self._compiling = compile
        self._ready = False

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
        draft_prefix: Prefix | None = None,
    ) -> Tensor:
        """Continue prompts, as `Decoder.generate` does.

        Args:
            ids, mask, tokens, on_tokens, every, prefix: see there; the host looks every `every` tokens at the latest.
            draft_prefix: what the draft has read of the prefix's text; None: it sees the prompts alone.

        Returns:
            New tokens [B, n] on the device, n where the last row ended or `tokens`; ended rows go on with `pad`.

        Raises:
            LinearizeError: more than was made room for; logits that are NaN.
        """
        if ids.shape[0] != self.batch:
            raise LinearizeError(f"{ids.shape[0]} prompts for {self.batch} rows")
        total = ids.shape[1] + tokens + max(0 if x is None else x.tokens for x in (prefix, draft_prefix))
        if tokens > self.most or (self.holds_tokens and total > self.length):
            raise LinearizeError(
                f"{total} tokens, {tokens} of them new, where there is room for {self.length} and {self.most}"
            )
        if mask is not None and bool((mask[:, 1:] < mask[:, :-1]).any()):
            self._leave_to_masks()  # keys that are seen do not lie side by side: only a mask can say which they are
        self.prepare()
        if tokens < 1:
            return ids[:, :0]
        self._read(ids, mask, tokens, prefix, draft_prefix)
        shown, started = 0, None
        while True:
            made, finished, sound = self._look()
            started = time.perf_counter() if started is None else started
            if not sound:
                raise LinearizeError(
                    "the model gives NaN or infinity and no logits: its numbers overflow or its weights are damaged; "
                    "load it in a wider dtype, or take another checkpoint"
                )
            ready = (
                max(made)
                if all(finished)
                else min(n for n, over in zip(made, finished, strict=True) if not over)
            )
            if on_tokens is not None and ready > shown:
                on_tokens(self._text(made, shown, ready).cpu())
                shown = ready
            if all(finished):
                self.seconds = time.perf_counter() - started
                return self._text(made, 0, ready)
            for _ in range(max(1, every // (self.ahead + 1))):
                self._replay()

    @torch.no_grad()
    def prepare(self) -> None:
        """Make the states with a few rounds of nothing, and capture, at the first call; the generator stays as it was.

        Raises:
            LinearizeError: a state is not written in place.
        """
        if self._ready:
            return
        try:
            self._make()
        except (LinearizeError, RuntimeError):
            # a family may want a mask where it is given numbers, or have scores that are not known here
            if not self._leave_to_masks():
                raise
            log.debug("kept softmax layers are given masks", exc_info=True)
            self._make()
        self._ready = True

    def _make(self) -> None:
        """The states and the graph, by what is known of the softmax layers."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            if self._captures:
                self._capture()
            else:
                self._twice()

    def _leave_to_masks(self) -> bool:
        """Softmax layers read all that they hold, from now on; whether that is new."""
        sides = (self.model, self.draft)
        if not any(side.newest for side in sides):
            return False
        for side in sides:
            side.newest = False
        self.graph, self._ready = None, False
        return True

    def _read(
        self,
        ids: Tensor,
        mask: Tensor | None,
        tokens: int,
        prefix: Prefix | None,
        draft_prefix: Prefix | None,
    ) -> None:
        """Read the prompts, the last token of each by the model alone, and choose each row's first new token."""
        ids = ids.to(self.device)
        for x in (self.made, self.finished, self.rounds, self.accepted, self.written):
            x.zero_()
        self.sound.fill_(True)
        self.limit.fill_(tokens)
        before = None if mask is None else mask[:, :-1]
        self.draft.start(self._told(ids[:, :-1]), before, draft_prefix, tokens + 1)
        logits = self.model.start(ids, mask, prefix, tokens)
        assert logits is not None, "a prompt has tokens"
        self._check(logits)
        first = self.sampling.choose(logits)[:, None]
        self.pair.copy_(torch.cat([ids[:, -1:], first], 1))
        self._write(first, torch.zeros_like(self.made))

    def _round(self, *, look: bool = False) -> None:
        """Draft, check, take, and take back.

        Args:
            look: the host may wait to see how many are taken, which saves masks where all rows take as many.
        """
        model, draft, sampling = self.model, self.draft, self.sampling
        model.begin()
        draft.begin()
        given, drafted, proposed = self.pair, [], []
        for _ in range(self.ahead):
            logits = self._fitted(draft.go(self._told(given)))
            if sampling.sample:
                proposed.append(sampling.probabilities(logits))
                given = draw(proposed[-1])[:, None]
            else:
                given = sampling.choose(logits)[:, None]
            drafted.append(given)
        tokens = torch.cat(drafted, 1)
        scores = model.go(torch.cat([self.pair[:, 1:], tokens], 1), every=True)
        if sampling.sample:
            wanted = sampling.probabilities(scores.flatten(0, 1)).unflatten(0, scores.shape[:2])
            tokens, agreed = accept_sampled(tokens, torch.stack(proposed, 1), wanted)
        else:
            tokens, agreed = accept_greedy(tokens, scores.float())
        running = ~self.finished
        kept = (torch.arange(self.ahead + 1, device=self.device) <= agreed[:, None]) & running[:, None]
        self._check(scores, kept)
        same = self._same(agreed, running) if look else None
        model.keep(kept, same)
        draft.keep(kept, same)
        text = torch.cat([self.pair[:, 1:], tokens], 1)
        self.pair.copy_(text.gather(1, torch.stack([agreed, agreed + 1], 1)))
        self.rounds += running
        self.accepted += agreed * running
        self._write(tokens, agreed)

    def _same(self, agreed: Tensor, running: Tensor) -> int | None:
        """Tokens that every running row keeps, if it is one number."""
        counts = set(agreed[running].tolist())
        return counts.pop() + 1 if len(counts) == 1 else None

    def _write(self, tokens: Tensor, agreed: Tensor) -> None:
        """Write tokens [B, n] of which the first `agreed` [B] and the next are text, up to one that ends it."""
        place = torch.arange(tokens.shape[1], device=self.device)
        self.written.scatter_(1, self.made[:, None] + place, tokens)
        ends = (tokens[..., None] == self.eos).any(-1) & (place <= agreed[:, None])
        ended = ends.any(1)
        count = torch.where(ended, ends.long().argmax(1), agreed) + 1
        self.made += torch.where(self.finished, 0, torch.minimum(count, self.limit - self.made))
        self.finished |= ended | (self.made >= self.limit)

    def _check(self, logits: Tensor, read: Tensor | None = None) -> None:
        """NaN or infinity, where they are read, would be decoded as whatever token comes first."""
        broken = (logits.isnan() | logits.isposinf()).any(-1)
        self.sound &= ~(broken if read is None else broken & read).any()

    def _told(self, ids: Tensor) -> Tensor:
        """Ids as the draft is told them: a row behind the tokenizer's that it lacks is another one, it only guesses."""
        return ids.clamp_max(self.known - 1)

    def _fitted(self, logits: Tensor) -> Tensor:
        """The draft's logits [B, V'] over the model's V rows, which may be more or fewer."""
        missing = self.width - logits.shape[1]
        return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing else logits

    def _look(self) -> tuple[list[int], list[bool], bool]:
        """Tokens made, rows ended, whether all logits were numbers; waits for the device."""
        facts = torch.cat([self.made, self.finished.long(), self.sound.long()[None]]).tolist()
        return facts[: self.batch], [bool(x) for x in facts[self.batch : -1]], bool(facts[-1])

    def _text(self, made: list[int], first: int, last: int) -> Tensor:
        """Columns of what was written, with padding behind ended rows."""
        place = torch.arange(first, last, device=self.device)
        count = torch.tensor(made, device=self.device)[:, None]
        return torch.where(place < count, self.written[:, first:last], self.pad)

    def _replay(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        with self._decoding():
            self._round(look=self.looks)

    def _decoding(self) -> ExitStack:
        """See `Reader`, of both models."""
        stack = ExitStack()
        for side in (self.model, self.draft):
            stack.enter_context(side._decoding())
        return stack

    def _idle(self) -> None:
        """A round of nothing, at the beginning of the buffers."""
        for side in (self.model, self.draft):
            side.clock.start(0)
            side.positions.zero_()
        for x in (self.made, self.finished, self.pair):
            x.zero_()
        self.limit.fill_(self.most)
        with self._decoding():
            self._round()

    def _twice(self) -> None:
        """Two rounds; the first makes the states, the second must leave every tensor where it is."""
        for side in (self.draft, self.model):
            logits = side.start(torch.zeros_like(self.pair[:, :1]), None, None, 1)
            assert logits is not None
            self.width = logits.shape[1]
        for side in (self.draft, self.model):
            side.compiled = None
        self._idle()
        before = self._places()
        for side in (self.draft, self.model):
            if self._compiling is not None:
                side.compiled = Compiled(side._forward_ahead, self._compiling, "a round's forward")
        self._idle()
        for side in (self.draft, self.model):
            self.obstacle = self.obstacle or (None if side.compiled is None else side.compiled.obstacle)
        moved = [name for name, place in self._places().items() if before.get(name) != place]
        if moved:
            raise LinearizeError(
                f"states that are not written in place cannot be taken back: {', '.join(moved[:3])}"
            )

    def _places(self) -> dict[str, int]:
        sides = {"model": self.model, "draft": self.draft}
        return {
            f"{name} {key}": x.data_ptr()
            for name, side in sides.items()
            for key, x in tensors(side.cache).items()
        }

    def _capture(self) -> None:
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._twice()
                self._idle()
            torch.cuda.current_stream().wait_stream(side)
            with self._decoding():
                try:
                    self.graph, _ = record(self._round)
                except RuntimeError as error:
                    self.obstacle = " ".join(str(error).split())[:200] or type(error).__name__
                    log.warning("rounds are no CUDA graph, which is slower: %s", self.obstacle)
