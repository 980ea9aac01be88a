"""Training: stages on transformers.Trainer, and the runner from a teacher to an exported checkpoint."""

from __future__ import annotations

from linearize.distill.callbacks import RunStopped
from linearize.distill.runner import run
from linearize.distill.summary import RunSummary

__all__ = ["RunStopped", "RunSummary", "run"]
