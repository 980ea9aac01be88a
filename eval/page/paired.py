"""Two conversions token by token: what the windows share falls out, and small differences show."""

from __future__ import annotations

from torch import Tensor

from linearize.errors import CheckpointError
from linearize.eval.intervals import bootstrap
from linearize.eval.page.sources import Subject
from linearize.eval.rows import STUDENT, TEACHER
from linearize.storing import read_tensors

SAME = 0.05
"""Nats: the teacher's scores of the same tokens differ by less on average, whatever machine they come from."""


def difference(first: Subject, second: Subject, task: str, length: int) -> tuple[float, float, float] | None:
    """Mean negative log-likelihood of the second student minus the first's over the same tokens, nats.

    Args:
        first, second: with the `tokens` folder that eval leaves beside its scores.
        task: of the text.
        length: tokens of its windows.

    Returns:
        (mean, low, high) at 95 %; None where scores of tokens are missing, or where the teachers' scores say that these
        are other tokens.
    """
    ours, theirs = (_nll(subject, STUDENT, task, length) for subject in (first, second))
    check = [_nll(subject, TEACHER, task, length) for subject in (first, second)]
    if ours is None or theirs is None or check[0] is None or check[1] is None:
        return None
    if len({tensor.shape for tensor in (ours, theirs, *check) if tensor is not None}) > 1:
        return None
    if not float((check[0] - check[1]).abs().mean()) < SAME:
        return None
    apart = (theirs - ours).double()
    seed = next(row.seed for row in first.rows)
    return bootstrap(apart.sum(1).numpy(), [apart.shape[1]] * len(apart), seed)


def _nll(subject: Subject, role: str, task: str, length: int) -> Tensor | None:
    """[windows, tokens]."""
    for row in subject.rows:
        if (row.role, row.task, row.length, row.metric, row.by) == (role, task, length, "ppl", ""):
            try:
                return read_tensors(subject.folder / "tokens" / f"{row.key}.safetensors")["nll"].float()
            except (CheckpointError, KeyError, OSError):
                return None
    return None
