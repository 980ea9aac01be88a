"""Instruction templates: a row's columns to a document whose prompt carries no loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from linearize.data.document import Document, Row
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


class Template:
    """How rows become documents.

    Args:
        name: ``none`` (plain text), ``alpaca`` (columns instruction, input, output), ``chat`` (a column of
            messages, or columns prompt and response, through the tokenizer's chat template), ``preference``
            (columns prompt, chosen and rejected, text or messages; through the chat template if there is one).
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
            needed, optional = ["prompt", "chosen", "rejected"], []
        elif self.name == "none":
            needed, optional = [self.text_field], []
        elif self.messages_field in have or not {"prompt", "response"} <= set(have):
            needed, optional = [self.messages_field], []
        else:
            needed, optional = ["prompt", "response"], []
        missing = [column for column in needed if column not in have]
        if missing:
            hint = " (or 'prompt' and 'response')" if self.name == "chat" else ""
            setting = "" if self.name in ("alpaca", "preference") else "; set data.text_field"
            near = closest(missing[0], have)
            columns = f" (columns: {', '.join(have)})" if near.startswith("did") else ""
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
            DataError: a value of the wrong type.
        """
        self.columns(row, where)
        return _MAKERS[self.name](self, row, where)


def _plain(template: Template, row: Row, where: str) -> Document | None:
    text = _text(row, template.text_field, where)
    return Document.plain(text) if text.strip() else None


def _alpaca(template: Template, row: Row, where: str) -> Document | None:
    fields = {name: _text(row, name, where) for name in ("instruction", "input", "output")}
    if not fields["output"].strip():
        return None
    prompt = (ALPACA_INPUT if fields["input"].strip() else ALPACA).format(**fields)
    return Document(((prompt, False), (fields["output"], True)))


def _chat(template: Template, row: Row, where: str) -> Document | None:
    messages = row.get(template.messages_field)
    if messages is None and "prompt" in row:
        messages = [
            {"role": "user", "content": _text(row, "prompt", where)},
            {"role": "assistant", "content": _text(row, "response", where)},
        ]
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages
    ):
        raise DataError(
            f"{where}: column '{template.messages_field}' must hold a list of messages, each with role and "
            f"content, not {str(messages)[:60]!r}"
        )
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        return None
    parts = _turns(template, messages, turns, where) or _turns(template, messages, turns[-1:], where)
    if parts is None:
        raise DataError(
            f"{where}: this tokenizer's chat template does not write an answer right after its prompt, so "
            "the two cannot be told apart; use template 'alpaca' or 'none'"
        )
    (*head, (last, loss)) = parts
    return Document((*head, (last.rstrip(), loss)), framed=True)


def _preference(template: Template, row: Row, where: str) -> Document | None:
    """Three parts: the prompt without loss, the chosen answer, the rejected one."""
    chosen, rejected = (
        _answered(row["prompt"], row[column], column, where) for column in ("chosen", "rejected")
    )
    if not chosen[1].strip() or not rejected[1].strip():
        return None
    if chosen[0] != rejected[0]:
        raise DataError(f"{where}: chosen and rejected must answer the same prompt; mend the row")
    if getattr(template.tokenizer, "chat_template", None) is None:
        if len(chosen[0]) != 1:
            raise DataError(
                f"{where}: a conversation of several turns needs a tokenizer with a chat template, and this model has "
                "none; put a chat_template.jinja into the checkpoint"
            )
        prompt = str(chosen[0][0]["content"])
        return Document(((prompt, False), (chosen[1], True), (rejected[1], True)))
    prompt = _render(template, chosen[0], where, add_generation_prompt=True)
    parts = [(prompt, False)]
    for answer in (chosen[1], rejected[1]):
        whole = _render(template, [*chosen[0], {"role": "assistant", "content": answer}], where)
        if not whole.startswith(prompt):
            raise DataError(
                f"{where}: this tokenizer's chat template does not write an answer right after its prompt, so the two "
                "cannot be told apart"
            )
        parts.append((whole[len(prompt) :].rstrip(), True))
    return Document(tuple(parts), framed=True)


def _answered(prompt: Any, answer: Any, column: str, where: str) -> tuple[list[Row], str]:
    """The messages before the answer, and the answer: text, one message, or the whole conversation."""
    before = (
        prompt
        if isinstance(prompt, list)
        else [{"role": "user", "content": _text({"prompt": prompt}, "prompt", where)}]
    )
    if not isinstance(answer, list):
        return before, _text({column: answer}, column, where)
    last = answer[-1] if answer else None
    if (
        not isinstance(last, dict)
        or last.get("role") != "assistant"
        or not isinstance(last.get("content"), str)
    ):
        raise DataError(f"{where}: column '{column}' must end with a message of the role assistant")
    return (before if len(answer) == 1 else answer[:-1]), last["content"]


def _turns(
    template: Template, messages: list[Row], turns: list[int], where: str
) -> list[tuple[str, bool]] | None:
    """Parts around the given assistant turns; None where the template rewrites earlier turns later on."""
    parts: list[tuple[str, bool]] = []
    done = ""
    for turn in turns:
        prompt = _render(template, messages[:turn], where, add_generation_prompt=True)
        whole = _render(template, messages[: turn + 1], where)
        if not prompt.startswith(done) or not whole.startswith(prompt):
            return None
        parts += [(prompt[len(done) :], False), (whole[len(prompt) :], True)]
        done = whole
    return parts


def _render(template: Template, messages: list[Row], where: str, **options: Any) -> str:
    from jinja2 import TemplateError

    try:
        return str(template.tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except TemplateError as error:
        raise DataError(
            f"{where}: the tokenizer's chat template refuses these messages: {error}; mend the row"
        ) from error


def _text(row: Row, column: str, where: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{where}: column '{column}' must hold text, not {type(value).__name__} ({str(value)[:60]!r})"
        )
    return value


_MAKERS: dict[str, Callable[[Template, Row, str], Document | None]] = {
    "none": _plain,
    "alpaca": _alpaca,
    "chat": _chat,
    "preference": _preference,
}
