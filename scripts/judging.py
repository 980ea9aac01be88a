"""The judge on a model that is still in memory, where it was trained: neither a checkpoint nor a second start.

Its scores are those of `linearize eval RUN --suite SUITE`, in the same file of the run's folder.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conversions import Row, bounds, figures, training

from linearize import data, models, surgery
from linearize.config.schema import DataConfig
from linearize.decode.bounded import bounded
from linearize.distill.identity import fingerprint
from linearize.eval import lm_tasks, suite
from linearize.eval.ablation import NO_LINEAR
from linearize.eval.cast import entrants
from linearize.eval.judge import judge
from linearize.eval.measurement import Setting
from linearize.eval.rows import STUDENT, TEACHER, Scores
from linearize.export import rounding

HELD = 8192
"""Tokens of the text of which the table says how many bytes are held."""


@dataclass(frozen=True)
class Judgement:
    """How a run's model is judged.

    Attributes:
        suite: of `linearize eval`.
        source: the teacher, as MODEL.
        texts: name -> source of its documents; "" is the package's own.
        autocast: of training and judging.
        dtype: of the teacher's weights.
        tasks: folder of the five local tasks' JSONL files; none of them without it.
        items: of each task; 0 takes all.
    """

    suite: str
    source: str
    texts: dict[str, str]
    autocast: torch.dtype | None
    dtype: torch.dtype
    tasks: Path | None = None
    items: int = 0

    def suites(self) -> list[suite.Suite]:
        """What is measured, in this order."""
        found = suite.load(self.suite)
        if self.tasks is not None:
            five = lm_tasks.suite(["all"], shots=None, limit=self.items, include=None, data=self.tasks)
            found += suite.of_roles([five], [TEACHER, STUDENT])
        return found

    def of(self, model: Any, tokenizer: Any, run: Path, command: str) -> Row:
        """A row of the leaderboard: figures of the model, of its teacher, and without the recurrent branch.

        Args:
            model: converted and trained; adapters are merged into it.
            tokenizer: of both.
            run: folder of the run; scores go into its `eval`, what runs beside it found of the teacher is taken over.
            command: for the scores.
        """
        if hasattr(model, "merge_and_unload"):
            model = rounding.merged(model, torch.float32)
        model.eval()
        device = next(model.parameters()).device
        teacher, _ = models.load_teacher(self.source, dtype=self.dtype, device=str(device), for_text=True)
        texts = {
            name: list(data.validation_documents(DataConfig(validation=source), tokenizer))
            for name, source in self.texts.items()
        }
        folder = run / "eval"
        folder.mkdir(parents=True, exist_ok=True)
        scores = Scores(folder / "results.json")
        teachers_from_beside(run, scores)
        setting = Setting(tokenizer, texts, folder, autocast=self.autocast)
        setting.device = device.type
        if device.type == "cuda":
            setting.batch_tokens *= 16
        cast = entrants(
            model,
            teacher.eval(),
            names=(run.name, self.source),
            identities=({"run": str(run)}, fingerprint(self.source)),
        )
        for _ in judge(self.suites(), cast, setting, scores, command=command):
            pass
        return judged_row(run, scores) | {"held_bytes": held_bytes(model, HELD)}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of a script that judges what it trains."""
    parser.add_argument(
        "--judge", metavar="SUITE", default="", help="of trained models, with --calibrated-only"
    )
    parser.add_argument("--task-data", type=Path, metavar="DIR", help="of the five local tasks, with --judge")
    parser.add_argument("--items", type=int, default=0, help="of a task; 0: all")


def judged_row(run: Path, scores: Scores) -> Row:
    """A run's row, from its scores and metrics."""
    roles = {"student": STUDENT, "teacher": TEACHER, "linear_off": NO_LINEAR}
    found: Row = {name: figures(scores.rows, role) for name, role in roles.items()}
    found["bounds"] = bounds(scores.rows, STUDENT)
    if (run / "environment.json").is_file():
        found["training"] = training(run)
    return found


def teachers_from_beside(run: Path, scores: Scores) -> None:
    """Take over what another run beside this one found of the same teacher: it has the same keys."""
    if scores.rows:
        return
    for path in sorted(run.parent.glob("*/eval/results.json")):
        rows = Scores(path).rows
        if {row.role for row in rows} > {TEACHER}:  # it goes first, so all of it is there
            scores.add([row for row in rows if row.role == TEACHER])
            return


def state_bytes(model: Any) -> int:
    """Of one sequence's state in bfloat16, layers that grow left out."""
    layers = surgery.converted(model)
    return sum(layer.mixer.state_bytes() for layer in layers if layer.mixer.has_fixed_state)


def held_bytes(model: Any, tokens: int) -> int:
    """What the decode engine holds of one text of so many tokens, in bfloat16: states, and keys and values."""
    config = model.config.get_text_config()
    layers = surgery.converted(model)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept = config.num_hidden_layers - len(layers)
    states = sum(bounded(layer.mixer, tokens).state_bytes() for layer in layers)
    return states + kept * tokens * 2 * config.num_key_value_heads * width * torch.bfloat16.itemsize
