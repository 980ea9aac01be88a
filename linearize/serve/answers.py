"""OpenAI's answers: objects of chat and completions, whole and as pieces of a stream."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from linearize.serve.scheduler import Score


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
    """

    chat: bool
    model: str
    tokenizer: Any
    made: int = field(default_factory=lambda: int(time.time()))
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    def whole(self, texts: list[tuple[str, str, list[Score] | None]], count: Count) -> dict[str, Any]:
        """The answer with every choice: text, how it ended, scores."""
        choices = []
        for index, (text, end, scores) in enumerate(texts):
            own: dict[str, Any] = (
                {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            )
            choices.append({"index": index, **own, "logprobs": self._scores(scores), "finish_reason": end})
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
        choice = {"index": index, **own, "logprobs": self._scores(scores), "finish_reason": end}
        return {**self._stream_head(), "choices": [choice]}

    def usage(self, count: Count) -> dict[str, Any]:
        """The last piece of a stream that was asked for it."""
        return {**self._stream_head(), "choices": [], "usage": count.body()}

    def _stream_head(self) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self.chat else "text_completion")

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.name}", "object": kind, "created": self.made, "model": self.model}

    def _scores(self, scores: list[Score] | None) -> dict[str, Any] | None:
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
        names = [self._named(score.token) for score in scores]
        offsets = [sum(map(len, names[:place])) for place in range(len(names))]
        return {
            "tokens": names,
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [{self._named(token): value for token, value in score.top} for score in scores],
            "text_offset": offsets,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        name = self._named(token)
        # a token may be a part of a character, whose bytes the text does not show
        return {"token": name, "logprob": logprob, "bytes": None if "\ufffd" in name else list(name.encode())}

    def _named(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))


def event(body: dict[str, Any] | str) -> bytes:
    """A server-sent event."""
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
