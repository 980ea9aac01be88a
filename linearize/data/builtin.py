"""The sample of text that ships inside the package, for runs without a network; see sample/README.md."""

from __future__ import annotations

from pathlib import Path

NAME = "builtin"
FOLDER = Path(__file__).parent / "sample"


def sample(split: str) -> Path:
    """The parquet file (columns text, source) of "validation", or under any other name of the training text."""
    return FOLDER / ("validation.parquet" if split == "validation" else "train.parquet")
