"""Conversations and tools as rows hold them, checked, in the one form that chat templates are given."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from linearize.errors import DataError
from linearize.registry import closest

Message = dict[str, Any]
"""role, and content (text) or tool_calls or both; further keys of the row as they were, but never one that is None."""

ROLES = ("system", "developer", "user", "assistant", "tool")
"""What transformers and the interfaces behind most data sets call the speakers."""

ALSO_CALLED = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
}
"""Speakers of other formats: of ShareGPT, which are read as these, and of the rest, for the message."""

DEEPEST = 100
"""Lists within lists that a row may hold; templates walk them by recursion, and no tool call nests so far."""


def conversation(value: Any, column: str) -> list[Message]:
    """The messages of a row.

    Args:
        value: a list of messages; content is text or a list of parts of the type text, which are joined. ShareGPT's
            `from` and `value` are read as role and content.
        column: where it stood.

    Raises:
        DataError: another shape, a part that is no text (an image), a message without content and tool calls, lists
            within lists beyond `DEEPEST`.
    """
    _check_depth(value, column)
    if isinstance(value, list):
        value = [_renamed(message) for message in value]
    if not isinstance(value, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in value
    ):
        raise DataError(
            f"column '{column}' must hold a list of messages, each with role and content, not {str(value)[:60]!r}"
        )
    return [_message(message, number) for number, message in enumerate(value, start=1)]


def _renamed(message: Any) -> Any:
    """A message of ShareGPT's with the keys that all others have."""
    if not isinstance(message, dict) or message.get("role") is not None:
        return message
    speaker = message.get("from")
    if not isinstance(speaker, str) or "value" not in message:
        return message
    others = {key: value for key, value in message.items() if key not in ("from", "value", "role", "content")}
    return {"role": ALSO_CALLED.get(speaker.lower(), speaker), "content": message["value"], **others}


def _message(message: Message, number: int) -> Message:
    # Columns of a table give every message all keys, and templates write None out or fail on it.
    made = {key: value for key, value in message.items() if value is not None}
    if "content" in made:
        made["content"] = _content(made["content"], number)
    calls = made.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"message {number}: tool_calls must be a list of calls, not {str(calls)[:60]!r}")
    if not calls:
        made.pop("tool_calls", None)
    if "content" not in made and not calls:
        raise DataError(
            f"message {number} ({made['role']}) has neither content nor tool_calls; a conversation must hold a list of "
            "messages, each with role and content"
        )
    return made


def _content(content: Any, number: int) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise DataError(
            f"message {number}: content must be text or a list of parts, not {type(content).__name__} "
            f"({str(content)[:60]!r})"
        )
    for part in content:
        if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"message {number}: holds a part of the type '{part.get('type')}', and only text can be trained on; "
                "leave such rows out"
            )
    return "".join(part["text"] for part in content)


def tools(value: Any) -> list[Any] | None:
    """The tools of a row: a list, each one or all of it possibly as JSON text; None where there are none.

    Raises:
        DataError: another shape, or one that is nested too deeply.
    """
    made = _parsed(value)
    if isinstance(made, list):
        made = [_parsed(tool) for tool in made]
    _check_depth(made, "tools")
    if not made:
        return None
    if not isinstance(made, list) or not all(isinstance(tool, dict) for tool in made):
        raise DataError(
            f"column 'tools' must hold a list of tools (or that as JSON text), not {str(value)[:60]!r}; mend or drop it"
        )
    return made


def _check_depth(value: Any, column: str) -> None:
    """Level by level, as Python's own limit depends on its version and on the caller's stack."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            item
            for outer in level
            if isinstance(outer, (dict, list))
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise DataError(f"column '{column}': lists within lists are too deep (more than {DEEPEST}); mend the row")


def _parsed(value: Any) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"column 'tools' is not JSON ({error}); mend or drop it") from error


def unknown_role(role: str, number: int, roles: Iterable[str] = ROLES) -> DataError:
    """What to say about a speaker that nobody knows."""
    meant = ALSO_CALLED.get(role.lower())
    near = f"did you mean '{meant}'?" if meant else closest(role, roles)
    return DataError(
        f"message {number} has the role {role[:60]!r}, which neither is a common one nor appears in the tokenizer's "
        f"chat template: {near}"
    )
