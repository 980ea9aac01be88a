"""A tokenizer's chat template: conversations to text, with the answers told apart from what leads to them."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import takewhile
from typing import Any

from linearize.data.control import ControlTokens
from linearize.data.document import Document
from linearize.data.messages import ROLES, Message, unknown_role
from linearize.errors import DataError
from linearize.models import render_chat

Parts = list[tuple[str, bool]]
"""(text, whether it is trained on), in order."""


class Chat:
    """The chat template of a tokenizer.

    Args:
        tokenizer: one that has a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._control = ControlTokens(tokenizer)
        self._source = str(tokenizer.chat_template)
        self._seen = {"user", "assistant"}

    def document(self, messages: list[Message], tools: list[Any] | None = None) -> Document | None:
        """The conversation up to its last answer, every answer trained on; None where there is no answer.

        Where the template rewrites earlier answers later on (it drops their thoughts), the last one alone.

        Raises:
            DataError: an unknown speaker, or messages that the template refuses or does not write whole.
        """
        self._check(messages, tools)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            return None

        def parts(messages: list[Message], tools: list[Any] | None) -> Parts:
            made = self._turns(messages, turns, tools) or self._turns(messages, turns[-1:], tools)
            if made is None:
                raise DataError(
                    "this tokenizer's chat template does not write an answer right after its prompt, so the two cannot "
                    "be told apart; use template 'alpaca' or 'none'"
                )
            (*head, (last, loss)) = made
            return [*head, (last.rstrip(), loss)]

        return self._document(parts, messages, tools)

    def pair(
        self, before: list[Message], answers: tuple[Message, Message], tools: list[Any] | None = None
    ) -> Document:
        """Three parts: the prompt without loss, and what follows it for either answer. Raises as `document`."""
        for answer in answers:
            self._check([*before, answer], tools)

        def parts(messages: list[Message], tools: list[Any] | None) -> Parts:
            *before, chosen, rejected = messages
            prompt = self._prompt([*before, chosen], len(before), tools)
            made = [(prompt, False)]
            for answer in (chosen, rejected):
                whole = self.render([*before, answer], tools)
                if not whole.startswith(prompt):
                    raise DataError(
                        "this tokenizer's chat template does not write an answer right after its prompt, so the two "
                        "cannot be told apart"
                    )
                made.append((whole[len(prompt) :].rstrip(), True))
            return made

        return self._document(parts, [*before, *answers], tools)

    def prompt(self, messages: list[Message]) -> Document:
        """What an answer to the messages would follow. Raises as `document`."""
        self._check(messages, None)
        return self._document(
            lambda messages, tools: [(self.render(messages, tools, add_generation_prompt=True), False)],
            messages,
            None,
        )

    def render(self, messages: list[Message], tools: list[Any] | None, **options: Any) -> str:
        """The messages as the template writes them.

        Raises:
            DataError: the template refuses them or fails.
        """
        if tools:
            options["tools"] = tools
        return render_chat(self._tokenizer, messages, **options)

    def _document(
        self,
        make: Callable[[list[Message], list[Any] | None], Parts],
        messages: list[Message],
        tools: list[Any] | None,
    ) -> Document:
        """The parts as a document in which control tokens that a message spells are text.

        They are, if the template hands strings on as they are. One that looks into them (for `</think>`, say) writes
        something else where they are marked; it then means what it finds, and the text stays as it is.
        """
        parts = make(messages, tools)
        texts = tuple(text for text, _ in parts)
        written = texts
        marked = self._control.mark(messages), self._control.mark(tools)
        if marked != (messages, tools):
            try:
                found = tuple(text for text, _ in make(*marked))
            except DataError:
                found = ()
            if tuple(map(self._control.unmark, found)) == texts:
                written = found
        return Document(tuple(parts), framed=True, written=written)

    def _turns(self, messages: list[Message], turns: list[int], tools: list[Any] | None) -> Parts | None:
        """Parts around the given answers; None where the template rewrites earlier turns later on."""
        parts: Parts = []
        done = ""
        for turn in turns:
            prompt = self._prompt(messages, turn, tools)
            whole = self.render(messages[: turn + 1], tools)
            if not prompt.startswith(done) or not whole.startswith(prompt):
                return None
            parts += [(prompt[len(done) :], False), (whole[len(prompt) :], True)]
            done = whole
        return parts

    def _prompt(self, messages: list[Message], turn: int, tools: list[Any] | None) -> str:
        """What the answer at `turn` follows."""
        if turn:
            return self.render(messages[:turn], tools, add_generation_prompt=True)
        # Templates are not made for no messages at all: what any two first answers share is what leads to them.
        answer = messages[0].get("content", "")
        other = {"role": "assistant", "content": "b" if answer.lstrip().startswith("a") else "a"}
        return _shared(self.render(messages[:1], tools), self.render([other], tools))

    def _check(self, messages: list[Message], tools: list[Any] | None) -> None:
        """Refuse what the template would drop in silence: speakers, calls and tools that it does not know."""
        for index, message in enumerate(messages):
            role = message["role"]
            if role not in ROLES and not (role and re.search(rf"\b{re.escape(role)}\b", self._source)):
                self.render(messages, tools)  # its own words first
                raise unknown_role(role, index + 1)
            if role not in self._seen:
                longer = {**message, "content": message.get("content", "") + "x"}
                if self._same(messages, tools, [*messages[:index], longer, *messages[index + 1 :]], tools):
                    raise DataError(
                        f"message {index + 1}: this tokenizer's chat template does not write messages of the role "
                        f"'{role}'; leave such rows out, or put a chat_template.jinja that does into the checkpoint"
                    )
                self._seen.add(role)
            if "tool_calls" in message:
                without = {"content": "", **message}
                del without["tool_calls"]
                if self._same(messages, tools, [*messages[:index], without, *messages[index + 1 :]], tools):
                    raise DataError(
                        f"message {index + 1}: this tokenizer's chat template does not write tool_calls; leave such "
                        "rows out, or put a chat_template.jinja that does into the checkpoint"
                    )
        if tools and messages and self._same(messages, tools, messages, None):
            raise DataError(
                "this tokenizer's chat template does not write tools; drop the column 'tools', or put a "
                "chat_template.jinja that does into the checkpoint"
            )

    def _same(
        self, messages: list[Message], tools: list[Any] | None, changed: list[Message], less: list[Any] | None
    ) -> bool:
        """Whether the template writes both the same; it does not where it refuses the second."""
        written = self.render(messages, tools)
        try:
            return self.render(changed, less) == written
        except DataError:
            return False


def _shared(one: str, other: str) -> str:
    """What two texts begin with."""
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
