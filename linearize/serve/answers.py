"""OpenAI's answers: objects of chat and completions, whole and as pieces of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from linearize.serve.scheduler import Score
from linearize.serve.text import BROKEN, Text


@dataclass
class Count:
    """Tokens of a request."""

    prompt: int = 0
    made: int = 0

    def body(self) -> dict[str, int]:
        """OpenAI's usage."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.made,
            "total_tokens": self.prompt + self.made,
        }


@dataclass
class Answers:
    """The objects that answer one request.

    Attributes:
        chat: of which endpoint.
        model: name of the model.
        tokenizer: to name tokens.
        before: ids that precede each choice's text, see `Text`.
    """

    chat: bool
    model: str
    tokenizer: Any
    before: Sequence[Sequence[int]] = ()
    made: int = field(default_factory=lambda: int(time.time()))
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    _places: dict[int, Place] = field(default_factory=dict)

    @cached_property
    def _names(self) -> Names:
        return Names(self.tokenizer)

    def whole(self, texts: list[tuple[str, str, list[Score] | None]], count: Count) -> dict[str, Any]:
        """The answer with every choice: text, how it ended, scores."""
        choices = []
        for index, (text, end, scores) in enumerate(texts):
            own: dict[str, Any] = (
                {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            )
            choices.append(
                {"index": index, **own, "logprobs": self._scores(index, scores), "finish_reason": end}
            )
        return {**self._head("chat.completion" if self.chat else "text_completion"), "choices": choices,
                "usage": count.body()}  # fmt: skip

    def piece(
        self,
        index: int,
        text: str | None,
        *,
        first: bool = False,
        end: str | None = None,
        scores: list[Score] | None = None,
    ) -> dict[str, Any]:
        """A piece of a stream: new text of one choice, or its end."""
        own: dict[str, Any] = {"text": text or ""}
        if self.chat:
            delta: dict[str, Any] = {"role": "assistant"} if first else {}
            own = {"delta": delta if text is None else {**delta, "content": text}}
        choice = {"index": index, **own, "logprobs": self._scores(index, scores), "finish_reason": end}
        return {**self._stream_head(), "choices": [choice]}

    def usage(self, count: Count) -> dict[str, Any]:
        """The last piece of a stream that was asked for it."""
        return {**self._stream_head(), "choices": [], "usage": count.body()}

    def _stream_head(self) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self.chat else "text_completion")

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.name}", "object": kind, "created": self.made, "model": self.model}

    def _scores(self, index: int, scores: list[Score] | None) -> dict[str, Any] | None:
        if scores is None:
            return None
        if self.chat:
            return {
                "content": [
                    {
                        **self._token(score.token, score.logprob),
                        "top_logprobs": [self._token(*each) for each in score.top],
                    }
                    for score in scores
                ],
                "refusal": None,
            }
        if index not in self._places:
            self._places[index] = Place(self.tokenizer, self.before[index] if self.before else ())
        place = self._places[index]
        return {
            "tokens": [self._names[score.token] for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [self._top(score) for score in scores],
            "text_offset": [place.of(score.token) for score in scores],
        }

    def _top(self, score: Score) -> dict[str, float]:
        """The likeliest tokens by name; of two that read alike the less likely one is its number."""
        found: dict[str, float] = {}
        for token, value in score.top:
            name = self._names[token]
            found[numbered(token) if name in found else name] = value
        return found

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        name = self._names[token]
        # a token may be a part of a character, whose bytes the text does not show
        whole = name != numbered(token)
        return {"token": name, "logprob": logprob, "bytes": list(name.encode()) if whole else None}


class Place:
    """Where the tokens of one choice begin in its text, in characters.

    Args:
        tokenizer: of transformers.
        before: tokens that precede the text.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int]) -> None:
        self._text, self._length = Text(tokenizer, (), before), 0

    def of(self, token: int) -> int:
        """Of the next token; a character's tokens all begin where it does."""
        begins = self._length
        self._length += len(self._text.push([token]))
        return begins


class Names:
    """What single tokens are called, where scores are told.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # what stands at the beginning loses its space in many tokenizers
        self._first = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        self._before = self._decode(self._first)

    def __getitem__(self, token: int) -> str:
        """A token's own text, with the space that parts it from a word before; a part of a character is a number."""
        name = self._decode([*self._first, token]).removeprefix(self._before)
        return numbered(token) if BROKEN in name else name

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def numbered(token: int) -> str:
    """What a token is called that has no text of its own, as other servers do."""
    return f"token_id:{token}"


def as_json(body: dict[str, Any]) -> bytes:
    """A body as the answers write it.

    A half of a character, which a client's own words may hold and UTF-8 has no bytes for, becomes JSON's escape of it.
    """
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")


def event(body: dict[str, Any] | str) -> bytes:
    """A server-sent event."""
    return b"data: " + (body.encode() if isinstance(body, str) else as_json(body)) + b"\n\n"
