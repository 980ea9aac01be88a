"""Folders as `linearize eval` and `linearize run` leave them, made of numbers that a test chooses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from linearize.eval.cast import CONTROLS, SINKS
from linearize.eval.rows import STUDENT, TEACHER, Score, Scores
from linearize.storing import write_tensors_file

WINDOWS, LENGTH = 6, 256
LM_EVAL = "linearize 0.1, lm-eval 0.4"


def score(role: str, task: str, metric: str, value: float, **more: Any) -> Score:
    more = {
        "low": None,
        "high": None,
        "n": 2 * (LENGTH - 1),
        "length": LENGTH,
        "model": "mine",
        "suite": "quick",
    } | more
    key = f"{role} {task} {more['length']}"
    return Score(role=role, task=task, metric=metric, value=value,
                 **{"key": key, "version": "linearize 0.1", "command": "linearize eval mine", **more})  # fmt: skip


def judged(
    folder: Path,
    *,
    name: str = "mine",
    teacher: str = "big",
    worse: float = 0.0,
    beyond: tuple[float, float, float] = (0.2, 0.1, 0.3),
    sample: str = "and then",
    seed: int = 0,
) -> Path:
    """A results.json with every kind of row, its token scores, and written texts.

    Args:
        worse: nats that the student's every token has more.
        beyond: how much more swa_sinks has beyond a window, with its interval.
        sample: what the student writes.
    """  # fmt: skip
    rows: list[Score] = []
    nll = {TEACHER: 3.0, STUDENT: 3.2 + worse} | {role: 4.0 + n for n, role in enumerate(CONTROLS)}
    for role, value in nll.items():
        ppl = float(torch.tensor(value).exp())
        rows.append(score(role, "text", "ppl", ppl, low=0.9 * ppl, high=1.1 * ppl))
        for bucket in ("0-64", "64-128", "128-256"):
            rows.append(score(role, "text", "ppl", ppl, by="position", bucket=bucket))
            rows.append(score(role, "text", "ppl_hit", ppl / 2, by="distance", bucket=bucket))
        rows.append(score(role, "text", "ppl_hit", ppl / 2, by="distance", bucket="64-256"))
        if role != TEACHER:
            rows.append(score(role, "text", "kl", value - 3, against=TEACHER))
        rows.append(score(role, "piqa (0-shot)", "acc", 0.6, low=0.5, high=0.7, length=None, version=LM_EVAL))
        for length in (128, 256):
            rows.append(score(role, "passkey", "exact", 0.6 if role == TEACHER else 0.25, length=length))
            rows.append(score(role, "passkey", "choice", 0.75, length=length))
            for depth in ("0.00", "1.00"):
                where = {"length": length, "by": "depth", "bucket": depth}
                rows.append(score(role, "passkey", "exact", 0.5, **where))
    low_high = {"low": beyond[1], "high": beyond[2], "against": STUDENT}
    rows.append(score(SINKS, "text", "nll_difference", 0.0, low=-0.1, high=0.1, against=STUDENT))
    rows.append(score(SINKS, "text", "nll_difference", beyond[0], by="distance", bucket="64-256", **low_high))
    for role in (TEACHER, STUDENT):
        for length in (128, 256):
            for metric, value in (("milliseconds", 5.0), ("cache_bytes", 1e6)):
                faster = 2.0 if role == STUDENT and length == 256 else 0.5 if role == STUDENT else 1.0
                where = {"length": length, "by": "batch", "bucket": "1"}
                rows.append(score(role, "prefill", metric, value / faster, **where))
        rows.append(score(role, "generation", "repetition", 0.1, length=16))
        made = {"role": role, "prompts": ["Once"], "texts": [sample if role == STUDENT else "upon a time"]}
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        (folder / "samples" / f"{role} generation 16.json").write_text(json.dumps(made))
    rows = [_named(row, name, teacher, seed) for row in rows]
    Scores(folder / "results.json").add(rows)
    drawn = torch.Generator().manual_seed(1)
    noise = torch.rand(WINDOWS, LENGTH - 1, generator=drawn)
    (folder / "tokens").mkdir(exist_ok=True)
    for role in (TEACHER, STUDENT):
        write_tensors_file(
            folder / "tokens" / f"{role} text {LENGTH}.safetensors", {"nll": noise + nll[role]}
        )
    return folder


def _named(row: Score, name: str, teacher: str, seed: int) -> Score:
    return Score(**{**row.to_dict(), "model": teacher if row.role == TEACHER else name, "seed": seed})


def trained(folder: Path) -> Path:
    """A run folder with a few lines of metrics, and its scores in `eval`."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("name: demo\n")
    lines = [
        {"stage": "transfer", "step": n, "tokens": 100 * n, "loss": 3.0 / n, "layers": [2.0 / n, 4.0 / n]}
        for n in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "results.json").write_text(
        json.dumps({"rows": [{"name": "teacher", "perplexity": {"held-out": 20.5}}]})
    )
    judged(folder / "eval", name=folder.name)
    return folder
