"""Ways to be cut off in the middle of a stage."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from linearize.distill.callbacks import StageCallback


def at_step(monkeypatch: pytest.MonkeyPatch, stage: str, step: int, action: Callable[[], None]) -> None:
    """Do something at the end of one step of one stage, before the stage's own callback runs."""
    original = StageCallback.on_step_end

    def on_step_end(self: StageCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stage_name == stage and state.global_step == step:
            action()
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(StageCallback, "on_step_end", on_step_end)


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)
