"""Instruction templates: a row's columns to a document whose prompt carries no loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

from linearize.data.chat import Chat
from linearize.data.continuations import pair
from linearize.data.document import Document, Row
from linearize.data.messages import Message, conversation, tools
from linearize.errors import DataError
from linearize.registry import closest

# The prompt of Stanford Alpaca (Taori et al. 2023), which LoLCATs trains on.
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

USUAL = {
    frozenset({"prompt", "chosen", "rejected"}): "preference",
    frozenset({"instruction", "output"}): "alpaca",
    frozenset({"prompt", "response"}): "chat",
    frozenset({"messages"}): "chat",
    frozenset({"conversations"}): "chat data.text_field=conversations",
}
"""Columns by which data sets are known, and the template that reads them."""


class Template:
    """How rows become documents.

    Args:
        name: ``none`` (plain text), ``rendered`` (text in which a chat template is written out already, so that the
            control tokens that it spells count), ``alpaca`` (columns instruction, input, output), ``chat`` (a column
            of messages, or columns prompt and response, through the tokenizer's chat template; tools, if there is such
            a column, are handed to it), ``preference`` (columns prompt, chosen and rejected, text or messages; through
            the chat template if there is one), ``continuations`` (such pairs out of plain text).
        text_field: the column of plain text; for ``chat``, of messages, unless it is left at "text".
        tokenizer: needed by ``chat``.

    Raises:
        DataError: no such template.
    """

    def __init__(self, name: str, text_field: str, tokenizer: Any = None) -> None:
        if name not in _MAKERS:
            raise DataError(f"unknown template '{name}': {closest(str(name), _MAKERS)}")
        self.name = name
        self.text_field = text_field
        self.tokenizer = tokenizer
        self.messages_field = text_field if text_field != "text" else "messages"
        self.passed = 0
        """Rows that made no document."""

    def columns(self, available: Iterable[str], where: str) -> list[str]:
        """The columns that will be read.

        Args:
            available: the source's columns.
            where: what to call the source in the message.

        Raises:
            DataError: a needed column is missing (offers the nearest), or the chat template's tokenizer is.
        """
        self._check_tokenizer()
        have = list(available)
        if self.name == "alpaca":
            needed, optional = ["instruction", "output"], ["input"]
        elif self.name == "preference":
            needed, optional = ["prompt", "chosen", "rejected"], ["tools"]
        elif self.name in ("none", "rendered", "continuations"):
            needed, optional = [self.text_field], []
        elif self.messages_field in have or not {"prompt", "response"} <= set(have):
            needed, optional = [self.messages_field], ["tools"]
        else:
            needed, optional = ["prompt", "response"], ["tools"]
        missing = [column for column in needed if column not in have]
        if missing:
            hint = " (or 'prompt' and 'response')" if self.name == "chat" else ""
            setting = (
                ""
                if self.name in ("alpaca", "preference")
                else "; rename the one that is meant, or set data.text_field"
            )
            near = closest(missing[0], have)
            columns = f" (columns: {', '.join(have)})" if near.startswith("did") else ""
            meant = next((other for usual, other in USUAL.items() if usual <= set(have)), None)
            fixed = self.name in ("preference", "continuations")  # what the objective reads is no choice
            if meant is not None and meant.split()[0] != self.name and not fixed:
                setting += f"; such columns are for data.template={meant}"
            raise DataError(
                f"{where} has no column '{missing[0]}'{hint}, which template '{self.name}' reads: "
                f"{near}{columns}{setting}"
            )
        return needed + [column for column in optional if column in have]

    def _check_tokenizer(self) -> None:
        if self.name == "chat" and self.tokenizer is None:
            raise DataError(
                "template 'chat' needs the model's tokenizer, and the model has none; use template 'none'"
            )
        if self.name == "chat" and not self.tokenizer.chat_template:
            raise DataError(
                "template 'chat' needs a tokenizer with a chat template, and this model's has none; use "
                "template 'alpaca', or put a chat_template.jinja into the checkpoint"
            )

    def document(self, row: Row, where: str) -> Document | None:
        """The row's document, or None where it is empty.

        Raises:
            DataError: a value of the wrong type or shape, or one that the chat template refuses.
        """
        self.columns(row, where)
        try:
            document = _MAKERS[self.name](self, row)
            if document is not None:
                document.text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: holds half of a surrogate pair ({error.object[error.start]!a}), which is no character; mend "
                "the row"
            ) from error
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        return document

    @property
    def is_changed(self) -> bool:
        """Whether it asks for anything but plain text in the column that usually holds it."""
        return self.name not in ("none", "rendered") or self.text_field != "text"

    @property
    def answers(self) -> bool:
        """Whether rows hold questions with answers; one without is a mistake, as an empty line of plain text is not."""
        return self.name in ("alpaca", "chat", "preference")

    @property
    def wants(self) -> str:
        """What a row that is passed over does not hold."""
        return {"chat": "answer of the assistant", "alpaca": "output", "preference": "pair of answers"}.get(
            self.name, "text"
        )

    @cached_property
    def chat(self) -> Chat:
        """The tokenizer's chat template."""
        return Chat(self.tokenizer)


def _plain(template: Template, row: Row) -> Document | None:
    text = _text(row, template.text_field)
    return Document.plain(text) if text.strip() else None


def _rendered(template: Template, row: Row) -> Document | None:
    text = _text(row, template.text_field)
    return Document.rendered(text) if text.strip() else None


def _alpaca(template: Template, row: Row) -> Document | None:
    fields = {name: _text(row, name) for name in ("instruction", "input", "output")}
    if not fields["output"].strip():
        return None
    prompt = (ALPACA_INPUT if fields["input"].strip() else ALPACA).format(**fields)
    return Document(((prompt, False), (fields["output"], True)))


def _chat(template: Template, row: Row) -> Document | None:
    value = row.get(template.messages_field)
    if value is None:
        prompt, response = (_text(row, column) for column in ("prompt", "response"))
        if not response.strip():
            return None
        value = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return template.chat.document(conversation(value, template.messages_field), tools(row.get("tools")))


def _preference(template: Template, row: Row) -> Document | None:
    """Three parts: the prompt without loss, the chosen answer, the rejected one."""
    if any(row.get(column) is None for column in ("prompt", "chosen", "rejected")):
        return None
    (before, chosen), (other, rejected) = (
        _answered(row["prompt"], row[column], column) for column in ("chosen", "rejected")
    )
    if not all(answer.get("content", "").strip() or "tool_calls" in answer for answer in (chosen, rejected)):
        return None
    if before != other:
        raise DataError("chosen and rejected must answer the same prompt; mend the row")
    offered = tools(row.get("tools"))
    if getattr(template.tokenizer, "chat_template", None) is not None:
        return template.chat.pair(before, (chosen, rejected), offered)
    if (
        len(before) != 1
        or offered
        or not all("content" in m and "tool_calls" not in m for m in (*before, chosen, rejected))
    ):
        raise DataError(
            "a conversation of several turns, or with tools, needs a tokenizer with a chat template, and this model "
            "has none; put a chat_template.jinja into the checkpoint"
        )
    return Document(((before[0]["content"], False), (chosen["content"], True), (rejected["content"], True)))


def _continuations(template: Template, row: Row) -> Document | None:
    """Three parts out of plain text; none where it holds a chat's markup."""
    text = _text(row, template.text_field)
    return None if "<|" in text else pair(text)


def _answered(prompt: Any, answer: Any, column: str) -> tuple[list[Message], Message]:
    """The messages before the answer, and the answer: text, one message, or the whole conversation."""
    if isinstance(prompt, list):
        before = conversation(prompt, "prompt")
    else:
        before = [{"role": "user", "content": _text({"prompt": prompt}, "prompt")}]
    if not isinstance(answer, list):
        return before, {"role": "assistant", "content": _text({column: answer}, column)}
    messages = conversation(answer, column)
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError(f"column '{column}' must end with a message of the role assistant")
    return (before if len(messages) == 1 else messages[:-1]), messages[-1]


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"column '{column}' must hold text, not {type(value).__name__} ({str(value)[:60]!r})")
    return value


_MAKERS: dict[str, Callable[[Template, Row], Document | None]] = {
    "none": _plain,
    "rendered": _rendered,
    "alpaca": _alpaca,
    "chat": _chat,
    "preference": _preference,
    "continuations": _continuations,
}
