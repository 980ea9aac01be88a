"""Ways to be cut off in the middle of a stage, and what an interrupted run is compared by."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from linearize.distill.callbacks import StageCallback
from linearize.distill.pieces import Pieces


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


class Crash(Exception):
    """Stands for a power cut: nothing of ours catches it."""


def crash() -> None:
    raise Crash


def losses(out: Path) -> list[tuple[Any, ...]]:
    """Every line of metrics.jsonl but for its speed; floats survive JSON bit for bit."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        (
            x["stage"],
            x["step"],
            x["tokens"],
            x["loss"],
            x["lr"],
            x["grad_norm"],
            x.get("layers"),
            x.get("lr_mixers"),
        )
        for x in lines
    ]


def finals(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for folder in sorted(out.glob("stage-*")):
        pieces = Pieces(folder / "final.safetensors")
        found[folder.name] = {name: pieces.whole(name) for name in pieces.shapes}
    return found
