"""Errors that a user can act on. Each message names the value, the rule and the remedy.

The command line prints these without a traceback and exits with 2; any other exception is a bug in this package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class LinearizeError(Exception):
    """Base of every error that is the caller's to fix."""

    exit_code = 2
    """What the command line exits with."""


class RecipeError(LinearizeError):
    """A recipe or an override is wrong.

    Args:
        problems: every mistake found, one sentence each; all of them are shown at once.
        where: what was being read, for the headline.
    """

    def __init__(self, problems: Sequence[str], where: str = "recipe") -> None:
        self.problems = list(problems)
        count = len(self.problems)
        headline = f"{where}: {count} problem{'s' if count != 1 else ''}"
        super().__init__("\n".join([headline, *(f"  - {problem}" for problem in self.problems)]))


@contextmanager
def collected(errors: list[LinearizeError]) -> Iterator[None]:
    """Inside, an error of recipe, model or text is kept for `raise_together`, so that the next one is found too."""
    try:
        yield
    except (RecipeError, UnsupportedModelError, ModelNotFoundError, DataError, CheckpointError) as error:
        errors.append(error)


def raise_together(errors: Sequence[LinearizeError], where: str) -> None:
    """Raise what was collected: nothing, the one error as it is, or all of them as one.

    Args:
        errors: of `collected`.
        where: what was looked at, for the headline of several.

    Raises:
        LinearizeError: see above; several make a RecipeError.
    """
    problems = [problem for error in errors for problem in getattr(error, "problems", [str(error)])]
    different = list(dict.fromkeys(problems))  # two stages that read one file miss it twice
    if len({str(error) for error in errors}) == 1:
        raise errors[0]
    if errors:
        raise RecipeError(different, where)


class UnsupportedModelError(LinearizeError):
    """The model's attention cannot be converted; the message names the module and the reason."""


class ModelNotFoundError(LinearizeError):
    """The MODEL argument is neither an alias, a folder, a GGUF file nor a reachable hub id."""


class DataError(LinearizeError):
    """Training or evaluation text is missing, unreadable, empty or shorter than a window."""


class CheckpointError(LinearizeError):
    """A checkpoint is corrupt, truncated, of an unknown version, or could not be written."""


class NonFiniteLossError(LinearizeError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""


class NotFiniteError(LinearizeError):
    """A model gives NaN or infinity for a text; its weights are damaged, or overflow."""


class RunFolderError(LinearizeError):
    """The run folder holds another run, or one that has ended."""
