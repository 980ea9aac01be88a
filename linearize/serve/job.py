"""One request under way: its texts, from the tokens that the scheduler hands out to the pieces that the client gets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from linearize.decode.row_choice import Wish
from linearize.serve.answers import Answers, Count, event
from linearize.serve.asked import Asked
from linearize.serve.refusal import Refusal
from linearize.serve.scheduler import Piece, Scheduler, Score, Ticket
from linearize.serve.text import Text


class Job:
    """The texts of a request.

    Made and used on the event loop that the scheduler posts to.

    Args:
        asked: by the client.
        scheduler: that makes them.
        tokenizer: of the model.
        name: of the model.
        deadline: of `time.monotonic`.

    Raises:
        Refusal: the scheduler takes nothing on.
    """

    def __init__(
        self, asked: Asked, scheduler: Scheduler, tokenizer: Any, name: str, deadline: float
    ) -> None:
        self.asked, self._scheduler, self._deadline = asked, scheduler, deadline
        # behind a raw prompt a first word keeps the space that parts it from the prompt
        before = [() if asked.chat else ids for ids in asked.prompts for _ in range(asked.n)]
        self.answers = Answers(asked.chat, name, tokenizer, before)
        self.count = Count(prompt=sum(map(len, asked.prompts)))
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._texts: list[Text] = []
        self._tickets: list[Ticket] = []
        for ids in asked.prompts:
            for turn in range(asked.n):
                seed = None if asked.seed is None else asked.seed + turn
                wish = Wish(asked.sampling, seed, asked.scores)
                own = before[len(self._texts)]
                self._texts.append(Text(tokenizer, asked.stops, own, whole=not asked.stream))
                self._tickets.append(self._ticket(ids, wish))
        scheduler.submit(self._tickets)

    def _ticket(self, ids: list[int], wish: Wish) -> Ticket:
        index = len(self._tickets)

        def put(piece: Piece) -> None:
            self._pieces.put_nowait((index, piece))

        asked = self.asked
        return Ticket(ids, asked.tokens, wish, put, self._deadline, endless=asked.endless, ends=asked.ends)

    def cancel(self) -> None:
        """Nobody waits for what is not done yet."""
        for ticket in self._tickets:
            self._scheduler.cancel(ticket)

    async def pieces(self) -> AsyncIterator[tuple[int, str, str | None, list[Score] | None]]:
        """(index of the text, what is new of it, how it ended or None, scores), in the order in which they are made.

        Raises:
            Refusal: one of them cannot be made; the others are given up as well.
        """
        left = len(self._tickets)
        ended = [False] * left
        try:
            while left:
                index, piece = await self._pieces.get()
                if ended[index]:  # behind a stop string
                    continue
                if piece.refusal is not None:
                    raise piece.refusal
                text, end = self._texts[index], piece.end
                new, read = text.read(piece.ids)
                if end is not None:
                    new += text.end()
                if text.stopped:
                    end = "stop"
                    self._scheduler.cancel(self._tickets[index], "stop")
                # tokens behind the one that ends a stop string are nobody's, however many a piece has
                self.count.made += read if text.stopped else piece.count
                ended[index] = end is not None
                left -= ended[index]
                scores = None if self.asked.scores is None else piece.scores[:read]
                if new or end or scores:
                    yield index, new, end, scores
        finally:
            self.cancel()

    async def whole(self) -> dict[str, Any]:
        """The answer once all texts are done. Raises as `pieces`."""
        texts: list[list[str]] = [[] for _ in self._tickets]
        ends = [""] * len(texts)
        scores: list[list[Score]] = [[] for _ in texts]
        async for index, new, end, found in self.pieces():
            texts[index].append(new)
            scores[index] += found or []
            ends[index] = end or ends[index]
        wanted = self.asked.scores is not None
        made = zip(texts, ends, scores, strict=True)
        return self.answers.whole([("".join(t), e, s if wanted else None) for t, e, s in made], self.count)

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events, while it is made; a refusal is the last one."""
        answers, begun = self.answers, set()
        try:
            async for index, new, end, scores in self.pieces():
                first = index not in begun
                begun.add(index)
                if new or scores or not end or first:
                    yield event(answers.piece(index, new, first=first, scores=scores))
                if end:
                    yield event(answers.piece(index, None, end=end))
                # that the client has gone is heard between two turns of the loop, and not while pieces are at hand
                await asyncio.sleep(0)
            if self.asked.usage:
                yield event(answers.usage(self.count))
        except Refusal as refusal:
            yield event(refusal.body())
        yield event("[DONE]")


def deadline(seconds: float) -> float:
    """So many seconds from now, of `time.monotonic`."""
    return time.monotonic() + seconds
