"""A request's body read: prompts as ids, and how their continuations are to be made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from linearize.data.chat import Chat
from linearize.data.tokens import Tokens
from linearize.decode.sampling import Sampling
from linearize.errors import LinearizeError
from linearize.models.tokenizer import check_ids
from linearize.serve.fields import Fields, check_text, shown
from linearize.serve.refusal import Refusal
from linearize.serve.text import controls

SHARED = (
    "model", "max_tokens", "temperature", "top_p", "top_k", "n", "stream", "stream_options", "stop", "seed",
    "logprobs", "ignore_eos",
)  # fmt: skip
CHAT = ("messages", *SHARED, "max_completion_tokens", "top_logprobs")
COMPLETION = ("prompt", *SHARED)
"""Fields of the two endpoints. `top_k` and `ignore_eos` are not OpenAI's, but many servers have them."""
MOST_STOPS, LONGEST_STOP = 16, 1000
MOST_CHOICES, MOST_PROMPTS = 16, 64
COMPLETION_TOKENS = 16
"""What OpenAI's completions make where nobody says how much."""
GREEDY = 1e-5
"""Temperatures below are taken for 0: logits divided by less overflow."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        prompt, new, both: tokens of a prompt, after it, and of the two together.
        body: bytes.
        seconds: from its arrival to its end.
    """

    prompt: int
    new: int
    both: int
    body: int
    seconds: float


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        chat: of which endpoint it is.
        prompts: ids of each.
        n: continuations of each prompt.
        tokens: most new tokens of each continuation.
        sampling, seed: how they are chosen; the continuations of a prompt count the seed up.
        stops: strings that end a text.
        ends: control tokens that end it, those that a stop string is the spelling of: no text holds them.
        scores: see `Wish.scores`.
        endless: go on behind tokens that end texts.
        stream, usage: pieces as they come, and a last one with the counts.
    """

    chat: bool
    prompts: list[list[int]]
    n: int
    tokens: int
    sampling: Sampling
    seed: int | None
    stops: tuple[str, ...]
    ends: frozenset[int]
    scores: int | None
    endless: bool
    stream: bool
    usage: bool


class Reader:
    """Reads bodies.

    Args:
        tokenizer: of the model.
        rows: of the model's embedding.
        name: what the model is called here.
        limits: of one request.
    """

    def __init__(self, tokenizer: Any, rows: int, name: str, limits: Limits) -> None:
        self.tokenizer, self.rows, self.name, self.limits = tokenizer, rows, name, limits
        self._chat = Chat(tokenizer) if getattr(tokenizer, "chat_template", None) else None
        self._tokens = Tokens(tokenizer)

    def read(self, body: dict[str, Any], *, chat: bool) -> Asked:
        """What a body asks for.

        Raises:
            Refusal: names the first field that is wrong, its value, the rule and the remedy.
        """
        fields = Fields(body, CHAT if chat else COMPLETION)
        self._check_model(fields.get("model", self.name))
        temperature = fields.number("temperature", 1.0, 0, 2)
        top_p, top_k = fields.number("top_p", 1.0, 0, 1), fields.whole("top_k", 0, -1, 2**31)
        sampling = Sampling()
        if temperature >= GREEDY:
            sampling = Sampling(True, temperature, max(top_k or 0, 0), top_p)
        seed = fields.whole("seed", None, -(2**63), 2**64)
        n, scores = fields.whole("n", 1, 1, MOST_CHOICES), self._scores(fields, chat)
        options = fields.get("stream_options", {})
        stream, stops, endless = fields.flag("stream"), self._stops(fields), fields.flag("ignore_eos")
        if not isinstance(options, dict) or (options and not stream):
            raise Refusal(
                400, "stream_options must be an object, and needs stream: true", param="stream_options"
            )
        usage = Fields(options, ("include_usage", "include_obfuscation")).flag("include_usage")
        prompts = self._conversation(fields) if chat else self._prompts(fields)
        tokens = self._most(fields, chat, max(map(len, prompts)))
        assert n is not None
        ends = frozenset(index for index, text in controls(self.tokenizer).items() if text in stops)
        return Asked(chat, prompts, n, tokens, sampling, seed, stops, ends, scores, endless, stream, usage)

    def _check_model(self, name: Any) -> None:
        if name != self.name:
            raise Refusal(
                404,
                f"the model {shown(name)} is not served here; it is '{self.name}' (or leave the field out)",
                param="model",
                code="model_not_found",
            )

    def _most(self, fields: Fields, chat: bool, prompt: int) -> int:
        """Most new tokens; checks the prompt's length."""
        limits = self.limits
        param = "messages" if chat else "prompt"
        room = min(limits.new, limits.both - prompt)
        if prompt > limits.prompt or room < 1:
            most = min(limits.prompt, limits.both - 1)
            raise Refusal(
                400,
                f"the prompt has {prompt:,} tokens, and at most {most:,} are taken here; shorten it, or start the "
                "server with a larger --max-prompt-tokens",
                param=param,
                code="context_length_exceeded",
            )
        name, default = "max_tokens", room if chat else min(COMPLETION_TOKENS, room)
        old = fields.whole(name, None, 1, limits.new)
        new = fields.whole("max_completion_tokens", None, 1, limits.new)
        if None not in (old, new) and old != new:
            raise Refusal(
                400, f"max_tokens {old:,} and max_completion_tokens {new:,} are two names of one number; give one",
                param="max_completion_tokens",
            )  # fmt: skip
        if new is not None:
            name, old = "max_completion_tokens", new
        asked = default if old is None else old
        if asked > room:
            raise Refusal(
                400,
                f"{name} {asked:,} after a prompt of {prompt:,} tokens is more than the {limits.both:,} that fit "
                f"together; ask for at most {room:,}",
                param=name,
                code="context_length_exceeded",
            )
        return asked

    def _scores(self, fields: Fields, chat: bool) -> int | None:
        if not chat:
            return fields.whole("logprobs", None, 0, 5)
        wanted, top = fields.flag("logprobs"), fields.whole("top_logprobs", None, 0, 20)
        if top is not None and not wanted:
            raise Refusal(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return (top or 0) if wanted else None

    def _stops(self, fields: Fields) -> tuple[str, ...]:
        stops = fields.get("stop", [])
        stops = [stops] if isinstance(stops, str) else stops
        if not isinstance(stops, list) or len(stops) > MOST_STOPS:
            raise Refusal(
                400,
                f"stop must be a string or a list of at most {MOST_STOPS}, got {shown(stops)}",
                param="stop",
            )
        for stop in stops:
            if not check_text(stop, "stop", "stop") or len(stop) > LONGEST_STOP:
                raise Refusal(
                    400,
                    f"each stop must have 1 to {LONGEST_STOP:,} characters, got {shown(stop)}",
                    param="stop",
                )
        return tuple(stops)

    def _prompts(self, fields: Fields) -> list[list[int]]:
        given = fields.get("prompt")
        if isinstance(given, str):
            given = [given]
        if not isinstance(given, list) or not given:
            raise Refusal(
                400,
                f"prompt must be text, a list of texts, ids of tokens, or a list of such lists, got {shown(given)}",
                param="prompt",
                code="invalid_type",
            )
        if all(isinstance(each, int) for each in given):
            given = [given]
        if len(given) > MOST_PROMPTS:
            raise Refusal(
                400, f"prompt: {len(given)} of them, and at most {MOST_PROMPTS} go together", param="prompt"
            )
        return [self._ids(each) for each in given]

    def _ids(self, given: Any) -> list[int]:
        if isinstance(given, list):
            if not given or not all(
                isinstance(token, int) and not isinstance(token, bool) and 0 <= token < self.rows
                for token in given
            ):
                raise Refusal(
                    400, f"a prompt of ids must hold numbers from 0 to {self.rows - 1:,}, got {shown(given)}",
                    param="prompt",
                )  # fmt: skip
            return given
        text = check_text(given, "prompt", "a prompt")
        return self._found(lambda: list(self.tokenizer(text)["input_ids"]), "prompt")

    def _conversation(self, fields: Fields) -> list[list[int]]:
        if self._chat is None:
            raise Refusal(
                400,
                f"the tokenizer of '{self.name}' has no chat template; use /v1/completions, or put a "
                "chat_template.jinja into the checkpoint",
                code="unsupported_endpoint",
            )
        messages = fields.get("messages")
        if not isinstance(messages, list) or not messages:
            raise Refusal(
                400,
                f"messages must be a list of at least one object with role and content, got {shown(messages)}",
                param="messages",
            )
        read = [_message(message, number) for number, message in enumerate(messages)]
        chat = self._chat
        return [self._found(lambda: self._tokens.document(chat.prompt(read)), "messages")]

    def _found(self, make: Callable[[], list[int]], param: str) -> list[int]:
        """Ids, at least one; what the tokenizer or its template refuses is a refusal."""
        try:
            ids = make()
            check_ids(ids, self.rows, self.tokenizer, "the prompt")
        except LinearizeError as error:
            raise Refusal(400, str(error), param=param) from None
        if not ids:
            raise Refusal(
                400, f"{param}: no token is in it; give at least one character to continue", param=param
            )
        return ids


def _message(message: Any, number: int) -> dict[str, Any]:
    """Role and content of a message, parts of text joined."""
    where = f"messages[{number}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Refusal(
            400, f"{where} must be an object with role and content, got {shown(message)}", param="messages"
        )
    extra = sorted(
        str(name)
        for name in message
        if name not in ("role", "content", "name") and message[name] not in (None, [])
    )
    if extra:
        raise Refusal(400, f"{where}.{extra[0][:60]} is not supported; leave it out", param="messages")
    check_text(message["role"], "messages", f"{where}.role")
    check_text(message.get("name") or "", "messages", f"{where}.name")
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise Refusal(
                400,
                f"{where}: a part of the type {shown(kind)}; only text can be read here",
                param="messages",
            )
        texts.append(check_text(part.get("text"), "messages", f"{where}.content"))
    return {"role": message["role"], "content": "".join(texts)}
