"""What a measurement is: tokens that it costs, and the scores that it makes of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from linearize.data import Document
from linearize.eval.cast import Entrant
from linearize.eval.perplexity import windows
from linearize.eval.rows import Score, key_of
from linearize.eval.suite import Takes, Unit
from linearize.eval.token_scores import Predictor

Made = TypeVar("Made")

STEP, GPU_STEP = 16, 1024
"""Tokens of a prefill that take as long as a step of decoding, roughly: a GPU waits for launches in both."""


@dataclass
class Setting:
    """What all measurements of a call share.

    Attributes:
        tokenizer: of every model; entrants have the same one.
        texts: name -> documents; "" is the package's own sample.
        folder: for what is too large for rows (scores of tokens, generated text).
        teacher: the teacher's predictions, or None where there is no teacher.
        device: kind of the device that everything runs on.
        longest: context that the models' tables of learned positions end at, or None.
        batch_tokens: how many go through a model at once, where a measurement has batches.
        key_of: (role, unit) -> key of that role's rows, "" where there is no such role, for what is compared in pairs.
    """

    tokenizer: Any
    texts: dict[str, list[Document]]
    folder: Path
    seed: int = 0
    device: str = "cpu"
    longest: int | None = None
    autocast: torch.dtype | None = None
    batch_tokens: int = 4096
    teacher: Predictor | None = None
    key_of: Callable[[str, Unit], str] = lambda role, unit: ""
    _made: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """What a step of decoding counts for in an estimate, in tokens."""
        return STEP if self.device == "cpu" else GPU_STEP

    def windows(self, text: str, length: int, most: int | None = None) -> Tensor:
        """Windows [N, length] of a text, as `perplexity.windows` cuts them; cut once, since every model reads the same.

        Args:
            text: key of `texts`.
            length: tokens of a window.
            most: windows at most; None or 0 takes all.

        Raises:
            DataError: as `perplexity.windows`.
        """
        return self.once(
            (text, length, most or None),
            lambda: windows(self.tokenizer, self.texts[text], window=length, max_windows=most),
        )

    def digest(self, text: str) -> str:
        """Tells a text from any other."""
        return self.once((text,), lambda: key_of([document.text for document in self.texts[text]]))

    def once(self, place: tuple[Any, ...], make: Callable[[], Made]) -> Made:
        """What is made of the setting, made at the first call and kept under that place."""
        if place not in self._made:
            self._made[place] = make()
        found: Made = self._made[place]
        return found


@dataclass(frozen=True)
class Call:
    """One measurement of one model."""

    unit: Unit
    entrant: Entrant
    key: str
    """Of the rows that come out."""


class Measurement(Protocol):
    """A task of a suite."""

    @property
    def takes(self) -> Mapping[str, Takes]:
        """The settings that a suite can give it."""

    @property
    def reads(self) -> bool:
        """Whether it is measured on the setting's texts."""

    @property
    def compares(self) -> bool:
        """Whether scores of the teacher or the student stand in another model's rows."""

    def room(self, unit: Unit) -> int:
        """Tokens that may follow the unit's context, for models whose positions end somewhere."""

    def units(self, unit: Unit, setting: Setting) -> Sequence[Unit]:
        """The unit as it will be measured: once for each text, or not at all where there is nothing to measure.

        Raises:
            DataError: what it needs is not there or too short; the unit is left out and the message shown.
        """

    def tokens(self, unit: Unit, setting: Setting) -> int:
        """Tokens that go through the model, for the estimate and the progress bar."""

    def measure(self, model: Any, call: Call, setting: Setting, meter: Any) -> list[Score]:
        """Scores, with metric, value, interval, n, by, bucket and against; the caller adds the rest.

        Args:
            model: in evaluation mode.
            call: what is asked for.
            setting: see there.
            meter: `advance(tokens)` as they go through the model, as many as `tokens` said.
        """


def score(
    metric: str,
    value: float,
    interval: tuple[float | None, float | None] = (None, None),
    n: int = 1,
    *,
    by: str = "",
    bucket: str = "",
    against: str = "",
) -> Score:
    """A score that does not yet say whose it is."""
    low, high = interval
    return Score("", "", "", "", metric, value, low, high, n, by=by, bucket=bucket, against=against)
