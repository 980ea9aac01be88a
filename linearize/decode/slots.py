"""Decoding of texts that come and go: each has a slot, a row of every state, and all slots take a token in one step.

Prompts are read piece by piece beside the rows, several together (`Prompts`), and each is copied into the first free
row when it is whole: states have constant size, so that is a copy of some megabytes whatever the prompt's length
(softmax layers copy the prompt's keys). Live rows always are the first ones; one that ends is replaced by the last. On
a GPU the step over the first 1, 2, 4, ... rows is a CUDA graph each; elsewhere it runs over exactly those that live.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from linearize.console import size
from linearize.decode.choice import unknown_steps
from linearize.decode.pieces import SEEN
from linearize.decode.prompts import Prompts
from linearize.decode.row_cache import Row, RowCache
from linearize.decode.row_choice import Scores, Wish, Wishes, likelihoods
from linearize.decode.row_model import WIDTH, RowModel
from linearize.errors import LinearizeError
from linearize.memory import free
from linearize.models.boundary import MEMORY
from linearize.recording import record

WARM_UP = 2
"""Steps before a capture: kernels compile, libraries allocate."""


@dataclass(frozen=True)
class Made:
    """What a call of `run` has made, on the host.

    Attributes:
        tokens: [B, n], of the rows that lived; `NO_NUMBER` where logits were none.
        scores: one for each of the n, or None where nobody wanted any.
    """

    tokens: Tensor
    scores: list[Scores] | None


class Slots:
    """A model with rows for texts.

    One thread uses it. A text goes through `begin`, `read` (as often as its prompt has pieces, beside others), `admit`,
    which gives its row and its first token, `run`, and `drop`; or `begin`, `read` and `forget`.

    Args:
        model: a causal language model of transformers in evaluation mode, on one device; converted layers, kept softmax
            layers and none converted at all are alike.
        rows: texts at once.
        length: tokens of a text, prompt included, that softmax layers hold; without such layers it is not read.
        most: places beyond which a text cannot go, such as those of a table of learned positions.
        prompts: that are read together at most; each takes the memory of a row more.
        capture: capture CUDA graphs where there is CUDA.

    Attributes:
        live: rows in use.

    Raises:
        LinearizeError: the model cannot be decoded so; says why.
    """

    def __init__(
        self,
        model: Any,
        rows: int,
        length: int,
        *,
        most: int | None = None,
        prompts: int = 1,
        capture: bool = True,
    ) -> None:
        problems = unknown_steps(model)
        if problems:
            raise LinearizeError(f"this model cannot decode rows that come and go: {'; '.join(problems)}")
        self.model, self.rows, self.prompts = model, rows, prompts
        self._rows = RowModel(model, length, most)
        self.device, self.length = self._rows.device, self._rows.length
        self._captures = capture and self.device.type == "cuda"
        self._ends: list[int] = []
        self._reading: Prompts | None = None
        self._held: RowCache | None = None
        self._cache: tuple[tuple[int, int], Cache] | None = None
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @property
    def live(self) -> int:
        """Rows in use."""
        return len(self._ends)

    @property
    def bytes(self) -> int:
        """Memory of all rows' states."""
        return self._held.bytes if self._held is not None else 0

    @torch.no_grad()
    def prepare(self) -> None:
        """Make the states, and capture the steps where they are captured; done by the first `begin` otherwise.

        Raises:
            LinearizeError: a state is not written in place, or there is too little memory.
        """
        if self._held is not None:
            return
        with self._fitting():
            like = self._rows.row()
            self._check_memory(like)
            rows = self.rows
            self._tokens, self._places, self._alive = self._whole(rows), self._whole(rows), self._whole(rows)
            self._wishes = Wishes(rows, self.device)
            self._reading = Prompts(self._rows, like, self.prompts, records=self._captures)
            self._held = RowCache(like, rows, self._rows.held)
            with self._decoding():
                self._forward(self.rows)
                self._check()
                for rows in self._sizes() if self._captures else ():
                    self._capture(rows)
        self._places.zero_()

    @torch.no_grad()
    def warm(self, piece: int, longest: int) -> None:
        """Read prompts of nothing in the shapes that come most, at the beginning and at the end of the longest.

        Kernels compile and pieces are recorded before anybody waits for them, and memory that reading lacks beside the
        slots is missed now.

        Args:
            piece: tokens that a call computes at most, see `read`.
            longest: tokens of a prompt.

        Raises:
            LinearizeError: there is too little memory.
        """
        self.prepare()
        longest = min(longest, self.length)
        with self._fitting(f" that read {piece:,} tokens of prompts at a time"):
            for width in sorted({1, min(17, longest)}):
                self._read_nothing([width])
            for count in sorted({1, self.prompts}):
                width = min(max(piece // count, 1), longest)
                turns = SEEN + 1 if self._reading is not None and self._reading.records else 1
                for _ in range(turns):
                    self._read_nothing([width] * count)
                    self._read_nothing([width] * count, behind=longest - width)
                if count > 1 and width > 1:  # with padding
                    self._read_nothing([width, *[width - 1] * (count - 1)], behind=longest - width)

    @torch.no_grad()
    def begin(self) -> int:
        """A prompt comes; its number among those that are being read, the last."""
        self.prepare()
        assert self._reading is not None and len(self._reading.read_of) < self.prompts
        return self._reading.begin()

    @torch.no_grad()
    def read(self, pieces: Sequence[Sequence[int]]) -> Tensor:
        """The next piece of every prompt being read, at least one token of each; logits [P, V] of what follows."""
        assert self._reading is not None
        for read, piece in zip(self._reading.read_of, pieces, strict=True):
            if read + len(piece) > self.length:
                raise LinearizeError(
                    f"a prompt of more than {self.length:,} tokens, which is what a slot holds"
                )
        return self._reading.read(pieces)

    @torch.no_grad()
    def admit(self, done: Sequence[int], logits: Tensor, wishes: Sequence[Wish]) -> Made:
        """Give prompts that have been read the first rows behind the live ones, in this order, and choose first tokens.

        Args:
            done: their numbers, in rising order; `forget` is called of each, from the last to the first.
            logits: [D, V] of what follows each.
            wishes: one for each.
        """
        assert self._held is not None and self._reading is not None and self.live + len(done) <= self.rows
        first, end = self.live, self.live + len(done)
        for row, prompt, wish in zip(range(first, end), done, wishes, strict=True):
            self._reading.give(prompt, self._held, row)
            self._ends.append(self._reading.read_of[prompt])
            self._wishes[row] = wish
        draws = None
        if any(wish.sampling.sample for wish in wishes):
            draws = torch.tensor([wish.draws(1)[0] for wish in wishes], device=self.device)
        chosen = self._wishes.choose(logits, draws, first)
        self._places[first:end] = torch.tensor(self._ends[first:], device=self.device)
        self._alive[first:end] = 1
        self._tokens[first:end] = chosen.clamp_min(0)
        wanted = max((wish.scores for wish in wishes if wish.scores is not None), default=None)
        scores = None if wanted is None else [likelihoods(logits, chosen, wanted).cpu()]
        for prompt in reversed(done):
            self.forget(prompt)
        return Made(chosen[:, None].cpu(), scores)

    @torch.no_grad()
    def forget(self, prompt: int) -> None:
        """A prompt is not read any more; the last one takes its number."""
        assert self._reading is not None
        self._reading.leave(prompt)

    @torch.no_grad()
    def run(self, steps: int) -> Made:
        """So many tokens more for every live row; those beyond a row's last place mean nothing."""
        live = self.live
        assert self._held is not None and live
        wanted, draws = self._wishes.scores(live), self._wishes.draws(live, steps)
        made, scores = [], []
        with self._decoding() if not self._captures else nullcontext():
            for step in range(steps):
                logits = self._step()[:live]
                chosen = self._wishes.choose(logits, None if draws is None else draws[step])
                self._tokens[:live] = chosen.clamp_min(0)
                made.append(chosen)
                if wanted is not None:
                    scores.append(likelihoods(logits, chosen, wanted))
                self._ends = [end + 1 for end in self._ends]
        tokens = torch.stack(made, 1).cpu()
        return Made(tokens, None if wanted is None else [each.cpu() for each in scores])

    @torch.no_grad()
    def drop(self, row: int, *, broken: bool = False) -> None:
        """Free a row; the last live one takes its place.

        Args:
            row: one that lives.
            broken: its numbers are none, and must not lie where another text will.
        """
        assert self._held is not None
        last = self.live - 1
        if broken:
            self._held.zero(row)
        if row != last:
            self._held.move(last, row, min(self._ends[last], self.length))
            self._tokens[row], self._places[row] = self._tokens[last], self._places[last]
            self._ends[row], self._wishes[row] = self._ends[last], self._wishes[last]
        # a row that is not alive writes its key at place 0, where every text has one of its own
        self._places[last], self._alive[last] = 0, 0
        self._wishes[last] = Wish()
        self._ends.pop()

    def clear(self) -> None:
        """Drop everything, as after an error whose reach is not known."""
        while self.live:
            self.drop(self.live - 1, broken=True)
        if self._reading is not None:
            self._reading.clear()

    def _read_nothing(self, widths: Sequence[int], behind: int = 0) -> None:
        """Read prompts of so many tokens behind others, and forget them."""
        for _ in widths:
            self.begin()
        assert self._reading is not None
        self._reading.skip(behind)
        self.read([[0] * width for width in widths])
        for prompt in reversed(range(len(widths))):
            self.forget(prompt)

    def _check_memory(self, row: Row) -> None:
        """Refuse more rows than fit, before the memory is written to."""
        most = free(self.device)
        # a step's logits, and its tokens, places and wishes
        step = self.model.get_input_embeddings().weight.shape[0] * self._rows.dtype.itemsize + 64
        each, beside = row.bytes + step, self.prompts * row.bytes
        wanted = self.rows * each + beside
        if most is None or wanted <= most:
            return
        # with fewer rows fewer prompts are read together
        fit = max((most - beside) // each, min(most // (each + row.bytes), self.prompts), 0)
        prompts = f" and {self.prompts:,} prompts that are read beside them" if self.prompts > 1 else ""
        remedy = f"take at most {fit:,}" if fit else "not one fits: take another model"
        remedy += ", or shorter texts, which softmax layers hold" if self._rows.held else ""
        raise LinearizeError(
            f"{self.rows:,} slots need more memory than there is: at {size(row.bytes)} each they take {size(wanted)} "
            f"with a step's logits{prompts}, and {size(most)} are free; {remedy}"
        )

    @contextmanager
    def _fitting(self, what: str = "") -> Iterator[None]:
        """Inside, running out of memory is told as what it is; what was made is not kept."""
        try:
            yield
        except RuntimeError as error:
            self._held = self._reading = None
            self._graphs.clear()
            if not isinstance(error, torch.OutOfMemoryError) and not MEMORY.search(str(error)):
                raise
            raise LinearizeError(
                f"{self.rows:,} slots{what} need more memory than there is; take fewer, smaller pieces, or shorter "
                "texts where softmax layers hold them"
            ) from error

    def _step(self) -> Tensor:
        """One token for all live rows, logits [B, V] of at least those."""
        if not self._captures:
            return self._forward(self.live)
        graph, logits = self._graphs[next(size for size in self._sizes() if size >= self.live)]
        graph.replay()
        return logits

    def _forward(self, rows: int) -> Tensor:
        cache, width = self._view(rows)
        places = self._places[:rows]
        logits = self._rows(self._tokens[:rows, None], places[:, None], cache, width)
        places.add_(self._alive[:rows]).clamp_max_(self.length - 1)
        return logits

    def _view(self, rows: int) -> tuple[Cache, int]:
        """The first rows' cache, and how wide its softmax layers are."""
        assert self._held is not None
        width = self._rows.held
        if width and not self._captures:
            longest = max(self._ends, default=0) + 1
            width = min(-(-longest // WIDTH) * WIDTH, width)
        if self._cache is None or self._cache[0] != (rows, width):
            self._cache = (rows, width), self._held.first(width, self._places[:rows, None], 1)
        return self._cache[1], width

    def _sizes(self) -> list[int]:
        """Rows of the captured steps."""
        powers = [2**i for i in range(self.rows.bit_length())]
        return sorted({*(size for size in powers if size < self.rows), self.rows})

    def _capture(self, rows: int) -> None:
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self._forward(rows)
            torch.cuda.current_stream().wait_stream(side)
            self._check()
            self._graphs[rows] = record(lambda: self._forward(rows))

    def _check(self) -> None:
        """A state that a step puts elsewhere would be lost with the cache that the step was given."""
        assert self._held is not None and self._cache is not None
        moved = self._held.moved(self._cache[1])
        if moved:
            raise LinearizeError(
                f"states that are not written in place cannot be shared: {', '.join(list(moved)[:3])}"
            )

    def _decoding(self) -> AbstractContextManager[Any]:
        """How transformers runs one-token steps: experts of a mixture in the form that is quicker there."""
        switch = getattr(self.model, "_optimize_model_for_decode", None)
        return nullcontext() if switch is None else switch()

    def _whole(self, *size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int64, device=self.device)
