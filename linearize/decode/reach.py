"""How far a model's positions reach behind a state: tables have an end, and some rotations change with the length."""

from __future__ import annotations

from typing import Any

from linearize.decode.limits import learned_positions
from linearize.errors import LinearizeError

CHANGING = ("dynamic", "longrope")
"""Kinds of RoPE that rotate all tokens otherwise once the text is longer than the original positions."""


def check_reach(model: Any, tokens: int, beside: str = "a state") -> None:
    """Refuse a text of so many tokens, state included, for which what has been read would no longer be right.

    Args:
        model: of transformers.
        tokens: of the text.
        beside: what can be left out, so that the whole text is rotated anew.

    Raises:
        LinearizeError: names the kind of positions, their number and the remedy.
    """
    table = learned_positions(model)
    if table is not None and tokens > table:
        raise LinearizeError(
            f"{tokens:,} tokens are more than the model's {table:,} learned positions; read a shorter text, or make "
            "fewer tokens"
        )
    for kind, least in _changes(model):
        if tokens > least:
            raise LinearizeError(
                f"{tokens:,} tokens with the RoPE '{kind}', which rotates all of them otherwise beyond "
                f"{least:,}: keys that are kept stay as they were rotated, so that would be another text; stay within "
                f"{least:,} tokens, prompt, state and new ones together, or generate without {beside}"
            )


def crossed(model: Any, prompt: int, tokens: int) -> str | None:
    """Why keys that are kept would not be those of a text of `tokens`, whose prompt is read anew, or None.

    Some families read the whole text again once it is longer than the original positions (Phi-3 in transformers), which
    buffers of fixed size know nothing of. A prompt that is longer already has been rotated as what follows it is.

    Args:
        model: of transformers.
        prompt: tokens that are read first.
        tokens: of the whole text.
    """
    for kind, least in _changes(model):
        if tokens > least and not (kind == "longrope" and prompt > least):
            return f"{tokens:,} tokens with the RoPE '{kind}', which rotates all of them otherwise beyond {least:,}"
    return None


def furthest(model: Any) -> int | None:
    """Tokens up to which a text's positions are right whatever stands beside it, or None: there is no such end.

    Those rotations change with the longest text of a call, so that a long one would turn its neighbours' keys.
    """
    table = learned_positions(model)
    ends = [least for _, least in _changes(model)] + ([] if table is None else [table])
    return min(ends, default=None)


def _changes(model: Any) -> list[tuple[str, int]]:
    """Kinds of rotations that are others for longer texts, and from how many tokens on."""
    config = model.config.get_text_config(decoder=True)
    found = []
    for rope in _ropes(getattr(config, "rope_parameters", None)):
        if rope.get("rope_type") in CHANGING:
            own = (
                rope.get("original_max_position_embeddings"),
                getattr(config, "max_position_embeddings", None),
            )
            found.append((rope["rope_type"], min((number for number in own if number), default=0)))
    return found


def _ropes(parameters: Any) -> list[dict[str, Any]]:
    """The rotations of a model: one, or one for each kind of layer."""
    if not isinstance(parameters, dict):
        return []
    inner = [value for value in parameters.values() if isinstance(value, dict)]
    return [parameters] if "rope_type" in parameters else inner
