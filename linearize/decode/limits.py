"""Between which ends the numbers of a generation lie; beyond them a call would not end, or sample from nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from linearize.errors import LinearizeError

COUNTS = {"max_new_tokens": (1, 1_000_000), "num_beams": (1, 100), "num_return_sequences": (1, 100)}
"""Whole numbers. Beams each hold a cache and all logits, and no text gets better beyond a handful."""
SAMPLING = {"temperature": (1e-5, 10_000), "top_p": (0, 1)}
"""What sampling reads. Logits divided by less overflow, and divided by more are all the same."""
REMEDY = {"temperature": "; without sampling (0 on the command line) the likeliest token is taken"}


def check_numbers(options: Mapping[str, Any], where: str = "") -> None:
    """Refuse numbers of `generate` that nobody can mean.

    Args:
        options: arguments of `generate` by name, or what a generation config holds; None and absent ones are fine.
        where: who gives them, for the message, where it is not the caller.

    Raises:
        LinearizeError: names the first one, its value and its two ends.
    """
    limits: dict[str, tuple[float, float]] = {**COUNTS, **(SAMPLING if options.get("do_sample") else {})}
    for name, (least, most) in limits.items():
        value = options.get(name)
        if value is None:
            continue
        whole = name in COUNTS
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not number or not least <= value <= most:
            kind = "a whole number" if whole else "a number"
            raise LinearizeError(
                f"{where}{name} must be {kind} from {least:,} to {most:,}, got {value!r:.60}{REMEDY.get(name, '')}"
            )


def check_room(model: Any, prompt: int, new: int) -> None:
    """Refuse more tokens than a table of learned positions (GPT-2) has rows; rotary models go on beyond their training.

    Args:
        model: a causal language model of transformers.
        prompt, new: tokens of the longest prompt, and at most to come.

    Raises:
        LinearizeError: the text would be longer; the message says by how much.
    """
    limit = learned_positions(model)
    if limit is not None and prompt + new > limit:
        room = f"at most {limit - prompt:,} fit behind it" if prompt < limit else "shorten the prompt"
        raise LinearizeError(
            f"max_new_tokens {new:,} after a prompt of {prompt:,} tokens is more than the model's {limit:,} learned "
            f"positions; {room}"
        )


def learned_positions(model: Any) -> int | None:
    """Tokens that the model's table of learned positions has rows for, or None where positions are computed or none."""
    table = position_table(model)
    if table is None:
        return None
    # OPT's table has two rows more than positions; RoBERTa counts from behind the row of the padding
    return (
        model.config.max_position_embeddings
        if table.padding_idx is None
        else table.num_embeddings - table.padding_idx - 1
    )


def position_table(model: Any) -> nn.Embedding | None:
    """The module that holds learned positions, or None where positions are computed, or where there are none."""
    config = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or getattr(config, "rope_parameters", None) is not None:
        return None
    words = model.get_input_embeddings()
    for module in model.modules():
        if (
            isinstance(module, nn.Embedding)
            and module is not words
            and 0 <= module.num_embeddings - limit < 8
        ):
            return module
    return None
