"""Fields of a request's body, each checked against its rule; what would be passed over in silence is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from linearize.registry import closest
from linearize.serve.refusal import Refusal

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}
"""Fields that are not supported, and the values at which they ask for nothing; null always is one."""
IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
)  # fmt: skip
"""Fields that change no answer."""


def parsed(body: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
        Refusal: it holds none.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = "lists within lists are too deep" if isinstance(error, RecursionError) else str(error)
        raise Refusal(400, f"the body is no JSON: {reason[:200]}") from None
    if not isinstance(found, dict):
        raise Refusal(400, f"the body must be a JSON object, got {shown(found)}")
    return found


class Fields:
    """A body's fields.

    Args:
        body: of the request.
        known: names that are read.

    Raises:
        Refusal: a field that nobody reads, with the nearest that is; one that asks for what is not supported.
    """

    def __init__(self, body: Mapping[str, Any], known: tuple[str, ...]) -> None:
        self._body = body
        for name, value in body.items():
            if name in known or name in IGNORED or value is None:
                continue
            if name in NEUTRAL:
                if not any(value == neutral for neutral in NEUTRAL[name]):
                    least = " or ".join(json.dumps(each) for each in NEUTRAL[name]) or "null"
                    raise Refusal(
                        400,
                        f"{name} is not supported; leave it out (got {shown(value)}; only {least} asks for nothing)",
                        param=name,
                        code="unsupported_parameter",
                    )
                continue
            near = closest(name, (*known, *NEUTRAL, *IGNORED))
            hint = near if near.startswith("did you mean") else f"known here: {', '.join(known)}"
            raise Refusal(
                400, f"unknown field {shown(name)}; {hint}", param=name[:64], code="unknown_parameter"
            )

    def get(self, name: str, default: Any = None) -> Any:
        """A field as it came; null is as if it were not there."""
        value = self._body.get(name)
        return default if value is None else value

    def whole(self, name: str, default: int | None, least: int, most: int) -> int | None:
        """A whole number in a range."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise Refusal(
                400,
                f"{name} must be a whole number from {least:,} to {most:,}, got {shown(value)}",
                param=name,
                code="invalid_value",
            )
        return value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """A number in a range."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            raise Refusal(
                400,
                f"{name} must be a number from {least:g} to {most:g}, got {shown(value)}",
                param=name,
                code="invalid_value",
            )
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise Refusal(
                400, f"{name} must be true or false, got {shown(value)}", param=name, code="invalid_type"
            )
        return value


def shown(value: Any) -> str:
    """A value as a message shows it, however long it is."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + " ..."


def check_text(text: Any, param: str, what: str) -> str:
    """A string that can be read as text.

    Raises:
        Refusal: it is none, or holds halves of characters.
    """
    if not isinstance(text, str):
        raise Refusal(400, f"{what} must be text, got {shown(text)}", param=param, code="invalid_type")
    if any("\ud800" <= sign <= "\udfff" for sign in text):
        raise Refusal(
            400, f"{what} holds halves of characters (\\ud800 to \\udfff); give it in UTF-8", param=param
        )
    return text
