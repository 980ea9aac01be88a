"""What happens around a training step: a line of metrics, the progress bar, and Ctrl-C."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from linearize import launched, plain_json, signals
from linearize.distill import processes
from linearize.errors import CheckpointError, LinearizeError
from linearize.progress import Meter
from linearize.storing import AGAIN, could_not_write, write_file

if TYPE_CHECKING:
    from linearize.distill.stage import StageTrainer


log = logging.getLogger(__name__)

ECHO = 5.0
"""Seconds in which a second signal is the first one again, where a launcher hands it on."""


class RunStopped(LinearizeError):
    """The run was stopped on request and can be resumed; the message holds the command.

    Args:
        message: what was saved, and the command.
        exit_code: by the signal that asked for it.
    """

    def __init__(self, message: str, exit_code: int = signals.INTERRUPTED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupt:
    """Turns the first Ctrl-C (or SIGTERM) into a wish to stop, and the second into an abort."""

    def __init__(self) -> None:
        self.requested = False
        self.exit_code = signals.INTERRUPTED
        self._agreed = False
        self._since = 0.0

    @property
    def wish(self) -> int:
        """The exit code of what this process was asked for; 0 for nothing."""
        return self.exit_code if self.requested else 0

    def agree(self, wish: int) -> None:
        """Take what any of several processes was asked for, at a point where all of them do."""
        if wish:
            self.requested, self.exit_code, self._agreed = True, wish, True

    @property
    def obeyed(self) -> bool:
        """Whether to stop now; of several processes all stop at once, with what they agreed on last."""
        return self._agreed if processes.several() else self.requested

    @contextmanager
    def watch(self, meter: Meter) -> Iterator[Interrupt]:
        """Listen inside the `with` block; outside it signals do what they did before."""
        if threading.current_thread() is not threading.main_thread():
            yield self  # only the main thread may set handlers
            return
        before = {number: signal.getsignal(number) for number in signals.STOPPING}
        owner = os.getpid()

        def on_signal(number: int, frame: FrameType | None) -> None:
            if os.getpid() != owner:
                return  # a data loader's process: it ends with this one
            if self.requested and time.monotonic() - self._since < (ECHO if processes.several() else 0):
                return  # a launcher hands on what the terminal has sent already
            if self.requested:
                signals.abort(number, frame)
            self.requested, self._since = True, time.monotonic()
            self.exit_code = signals.code_of(number)
            again = "press Ctrl-C again" if number == signal.SIGINT else "send SIGTERM again"
            if launched.first():
                meter.note(f"stopping after this step; {again} to abort at once")

        for number in before:
            signal.signal(number, on_signal)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class StageCallback(TrainerCallback):
    """Counts tokens, writes metrics.jsonl, moves the meter and obeys `Interrupt`.

    Args:
        trainer: the stage's trainer, asked for the averages since the last line.
        metrics: the file that lines are added to.
        meter: shown progress.
        interrupt: looked at after every optimizer step.
        track: takes each line too, in the first process.
    """

    def __init__(
        self,
        trainer: StageTrainer,
        metrics: Path,
        meter: Meter,
        interrupt: Interrupt,
        track: Callable[[dict[str, Any]], None] = lambda line: None,
    ) -> None:
        self.trainer = trainer
        self.metrics = metrics
        self.meter = meter
        self.interrupt = interrupt
        self.track = track
        self._since = time.monotonic()
        self._tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        course = self.trainer.course
        tokens = course.trained(state.global_step) - course.trained(state.global_step - 1)
        self._tokens += tokens
        if state.global_step % args.logging_steps == 0 or state.global_step >= state.max_steps:
            numbers = self.trainer.take_window()
            now = time.monotonic()
            line = {
                "stage": self.trainer.stage_name,
                "step": state.global_step,
                "tokens": course.trained(state.global_step),
                "tokens_per_second": round(self._tokens / max(now - self._since, 1e-9), 1),
                **numbers,
            }
            self._since, self._tokens = now, 0
            if launched.first():
                append_line(self.metrics, line)
                self.track(line)
            self.meter.advance(tokens, loss=numbers["loss"])
        else:
            self.meter.advance(tokens)
        control.should_log = False  # Trainer would gather a loss that all have already, for nobody
        if state.global_step >= state.max_steps:
            control.should_save = False  # the stage's result is written right after this
        elif self.interrupt.obeyed:
            control.should_save = control.should_training_stop = True


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add one JSON line to a file.

    Raises:
        CheckpointError: the disk is full or refuses.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(plain_json.dumps(line) + "\n")
    except OSError as error:
        raise could_not_write(path, error) from error


def forget_lines(path: Path, stage: str, after: int) -> None:
    """Drop a stage's lines of steps after `after`: a resumed run trains, and writes, those steps again.

    Lines that are none of ours go too, with a notice; but for the last one, which a kill may have cut off.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if not path.exists():
        return
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}). Move it away, then {AGAIN}; later steps begin a new one"
        ) from error
    kept, damaged = [], 0
    for number, text in enumerate(lines, start=1):
        line = _parsed(text)
        if line is None:
            damaged += number < len(lines)
        elif line["stage"] != stage or line["step"] <= after:
            kept.append(text.decode())
    if damaged:
        log.warning("%s: %d damaged lines are dropped", path, damaged)
    write_file(path, "".join(f"{text}\n" for text in kept))


def _parsed(text: bytes) -> dict[str, Any] | None:
    """A line of metrics, or None where it is none."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    whole = (
        isinstance(line, dict) and isinstance(line.get("stage"), str) and isinstance(line.get("step"), int)
    )
    return line if whole else None
