"""`linearize plan` beside what was measured: memory and time of every training row of docs/results.

PYTHONPATH=. python scripts/results/plan_check.py [ROWS.json ...]    # default: train-h200.json and scale-h200x2.json

Memory is to be within 15 % and time within 25 %. Rows of several cards are held by memory, their time by what `plan`
takes several cards to reach. Ends with 1 where a row misses that is not of a step that the package no longer makes.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from linearize.bench import flops
from linearize.bench.subjects import TEACHER, convert, random_model
from linearize.bench.train import STAGES
from linearize.config.schema import StageConfig
from linearize.cost import speed
from linearize.cost.cards import CARDS
from linearize.cost.memory import Sizes
from linearize.cost.stages import sizes_of
from linearize.cost.strategy import shares
from linearize.distill.trainable import prepare
from linearize.eval import tables

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
FILES = ("train-h200.json", "scale-h200x2.json")
MEMORY, TIME = 0.15, 0.25
GONE = ("a54b486", "b7e25fd", "62dabdc", "f6c3851", "d6aecf1", "dd86310")
"""Commits whose attention transfer was another step: to the end of the model, with masks and gradients of q, k, v."""
KEPT_MORE = ("a54b486", "b7e25fd", "62dabdc", "f6c3851", "d6aecf1", "452dbe9")
"""Commits whose compiled blocks kept for backward what is made again since: the memory of their end-to-end stages."""

Row = dict[str, Any]


def main(arguments: list[str]) -> int:
    """Print a table of all rows, and how many miss."""
    paths = [Path(path) for path in arguments] or [RESULTS / name for name in FILES]
    found = [compared(row) for path in paths for row in rows(path)]
    print(tables.markdown([{key: value for key, value in row.items() if key != "missed"} for row in found]))
    missed = [row for row in found if row["missed"] and not row["note"]]
    print(
        f"\n{len(found)} rows, {len(missed)} beyond {100 * MEMORY:.0f} % of memory or {100 * TIME:.0f} % of time"
    )
    return int(bool(missed))


def rows(path: Path) -> list[Row]:
    """What has a figure in a file of `bench train` or of `scripts/scale.py`, of kernels: no plan is of plain torch."""
    read = json.loads(path.read_text(encoding="utf-8"))
    listed: list[Row] = read["rows"] if isinstance(read, dict) else read
    return [row for row in listed if row["tokens_per_second"] and "plain torch" not in row.get("way", "")]


def gone(row: Row) -> str:
    """Why a row is of a step that is no longer made, or nothing."""
    gone = row.get("commit") in GONE and row["stage"] == "transfer"
    return "a pass to the model's end, with masks and gradients of q, k and v" if gone else ""


def compared(row: Row) -> Row:
    """A row of the table.

    Args:
        row: with shape, recipe, stage, batch, length, tokens_per_second, peak_gib; of several cards with processes,
            shard, sequence and micro_batch.
    """
    sizes, each = sizes_and_flops(row["shape"], row["recipe"], row["stage"], row["length"])
    cards, sequence = row.get("processes", 1), row.get("sequence", 1)
    # a row that says nothing of it had all its sequences at once
    at_once = row.get("micro_batch") or row["batch"] * sequence // cards
    tokens = at_once * row["length"] // sequence
    way = "sharded" if row.get("shard") == "full" else "one card"
    peak = sum(shares(sizes, row["stage"], tokens, way, cards, False).values()) / 2**30
    rate = 1 / speed.seconds(sizes, row["stage"], each, tokens, CARDS["h200"])
    rate *= cards * speed.SCALING if cards > 1 else 1
    held = way == "one card" and sequence == 1
    kept_more = row.get("commit") in KEPT_MORE and row["stage"] != "transfer"
    off_memory, off_time = peak / row["peak_gib"] - 1, row["tokens_per_second"] / rate - 1
    return {
        "shape": row["shape"],
        "recipe": row["recipe"],
        "stage": row["stage"],
        "cards": cards,
        "tokens a card": tokens,
        "commit": row.get("commit", ""),
        "GiB": f"{row['peak_gib']:.2f}",
        "plan, GiB": f"{peak:.2f}",
        "memory": f"{100 * off_memory:+.0f} %",
        "tokens/s": f"{row['tokens_per_second']:,.0f}",
        "plan, tokens/s": f"{rate:,.0f}" if held else "",
        "time": f"{100 * off_time:+.0f} %" if held else "",
        "note": gone(row),
        "missed": (abs(off_memory) > MEMORY and not kept_more) or (held and abs(off_time) > TIME),
    }


@functools.cache
def sizes_and_flops(shape: str, recipe: str, stage: str, length: int) -> tuple[Sizes, float]:
    """A shape in a stage, counted on a model without weights, and the FLOPs of a token."""
    with torch.device("meta"):
        model = random_model("meta", torch.bfloat16, shape)
        count = sum(parameter.numel() for parameter in model.parameters())
        model = prepare(convert(model, recipe), StageConfig(**STAGES[stage]))
    name = None if recipe == TEACHER else recipe
    sizes = sizes_of(model, stage, name, count, apart=stage == "all_kl")
    return sizes, flops.per_token(model, stage, length)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
