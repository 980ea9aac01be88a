"""The sample of text that ships inside the package, for runs without a network. Its README says where it comes from."""

from __future__ import annotations

from pathlib import Path

NAME = "builtin"
FOLDER = Path(__file__).parent / "sample"


def sample(split: str) -> Path:
    """The parquet file of a split: "validation", or anything else for the training text. Columns: text, source."""
    return FOLDER / ("validation.parquet" if split == "validation" else "train.parquet")
