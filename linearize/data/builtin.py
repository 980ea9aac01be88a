"""The sample of text that ships inside the package, for runs without a network; see sample/README.md."""

from __future__ import annotations

from pathlib import Path

from linearize.config.names import BUILTIN
from linearize.errors import DataError
from linearize.registry import closest

NAME = BUILTIN
FOLDER = Path(__file__).parent / "sample"
SPLITS = ("train", "validation")

COLUMN = "text"
TEMPLATE = "rendered"
"""Half of it are a teacher's samples with their chat markup."""
PAIRS = "continuations"
"""What makes pairs of it, for preference stages."""


def sample(split: str) -> Path:
    """The parquet file (columns text, source) of a split.

    Raises:
        DataError: no such split.
    """
    if split not in SPLITS:
        raise DataError(f"data.split: the built-in text has no split '{split}': {closest(split, SPLITS)}")
    return FOLDER / f"{split}.parquet"


def check(template: str, text_field: str) -> None:
    """Refuse options that would be without effect.

    Raises:
        DataError: a template for rows, or another column.
    """
    if template not in ("none", TEMPLATE, "preference"):
        raise DataError(
            f"data.template: the built-in text is plain text, which template '{template}' does not read; leave it out, "
            "or give data.source"
        )
    if text_field != COLUMN:
        raise DataError(
            f"data.text_field: the built-in text has no column '{text_field}'; leave it out, or give data.source"
        )
