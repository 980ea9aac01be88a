"""What a run says when it has ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group

from linearize.eval import tables


@dataclass(frozen=True)
class RunSummary:
    """What a run left behind."""

    folder: Path
    checkpoint: Path
    report: Path
    rows: list[dict[str, Any]]
    """The rows of results.json."""
    seconds: float
    """Wall time of this process's share of the run."""

    def table(self) -> Group:
        """The rows for the terminal: perplexities, and the tasks' accuracies where there are any."""
        return tables.results(self.rows, metrics=["acc"])
