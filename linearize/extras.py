"""How a part of the package that was left out is installed, in words that hold wherever they are read."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def install(extra: str) -> str:
    """The command: by name where the package is installed, which pip then leaves as it is, else from its checkout."""
    try:
        distribution("linearize")
        place = "linearize"
    except PackageNotFoundError:  # run from a checkout; by its name an index would give another project
        place = str(Path(__file__).resolve().parents[1])
    return f"pip install '{place}[{extra}]'"
