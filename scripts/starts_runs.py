"""What the runs of `starts.py` have left in their folders."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from linearize import data
from linearize.distill import calibrate


def folder_of(options: argparse.Namespace, name: str, *, on: bool) -> Path:
    runs: Path = options.runs
    return runs / f"{name.replace(' ', '+')}-{'calibrated' if on else 'published'}"


def starts_of(out: Path) -> dict[str, Any]:
    """What a row has before any training, from a run's folder, whole or not."""
    results = results_of(out)
    titles = (("swapped", "swapped, untrained"), ("calibrated", "calibrated"))
    found: dict[str, Any] = {key: results.get(title) for key, title in titles}
    done = out / f"stage-0-{calibrate.NAME}" / calibrate.DONE
    if done.is_file():
        layers = json.loads(done.read_text())["layers"]
        found["layers"] = [[round(layer["before"], 4), round(layer["after"], 4)] for layer in layers]
    return found


def results_of(out: Path) -> dict[str, dict[str, float]]:
    """Name of a row of results.json -> its perplexities, by the names of this script."""
    path = out / "results.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    return {
        row["name"]: {
            ("demo" if text == data.HELD_OUT else text): round(value, 2)
            for text, value in row["perplexity"].items()
        }
        for row in rows
    }
