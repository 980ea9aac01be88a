"""What the runs of `scripts/results/card.sh precision` came to: losses and perplexities with weights in two precisions.

    python scripts/results/precision_rows.py OUT/precision --device "NVIDIA H200" --out docs/results/precision-h200.json

Runs are folders named RECIPE-WEIGHTS. Rows of other runs that the file has stay, each with its commit. Prints the table
of docs/training.md; `apart` is float32's figure as a share.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

from sheet import commit, markdown


def main(arguments: list[str] | None = None) -> int:
    """Read, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", required=True, help="what they ran on")
    parser.add_argument("--note", default="")
    parser.add_argument("--commit", default=None, help="of what ran (default: the checkout's)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    about = {
        "command": "scripts/results/card.sh precision",
        "commit": options.commit or commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "device": options.device,
        "note": options.note,
    }
    rows = [
        _row(folder) | {"commit": about["commit"]}
        for folder in sorted(options.folder.iterdir())
        if (folder / "results.json").is_file()
    ]
    before = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {"rows": []}
    coming = {(row["recipe"], row["weights"]) for row in rows}
    stay = [row for row in before["rows"] if (row["recipe"], row["weights"]) not in coming]
    rows = [{"commit": before.get("commit")} | row for row in stay] + rows
    options.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    return 0


def _row(folder: Path) -> dict[str, Any]:
    recipe, _, weights = folder.name.rpartition("-")
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    stages: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if "loss" in line:
            stages.setdefault(line["stage"], []).append(line)
    return {
        "recipe": recipe,
        "weights": weights,
        "perplexity": {row["name"]: row["perplexity"] for row in found},
        "stages": {
            name: {
                "tokens": said[-1]["tokens"],
                "mean_of_last_tenth": mean(line["loss"] for line in said[-max(1, len(said) // 10) :]),
                "lines": len(said),
            }
            for name, said in stages.items()
        },
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A line a run: losses at the ends of stages, perplexities behind them, and how far they are from float32's."""
    exact = {row["recipe"]: row for row in rows if row["weights"] == "float32"}
    lines = []
    for row in rows:
        other = exact.get(row["recipe"], row)
        stages = [
            f"{name} {stage['mean_of_last_tenth']:.5g} ({stage['tokens'] / 1e6:.1f} M tokens)"
            for name, stage in row["stages"].items()
        ]
        for name, texts in row["perplexity"].items():
            against = other["perplexity"].get(name, {})
            figures = [
                f"{text} {value:.3f}{_apart(value, against.get(text))}" for text, value in texts.items()
            ]
            lines.append([row["recipe"], row["weights"], name, ", ".join(figures)])
        lines.append([row["recipe"], row["weights"], "losses", ", ".join(stages)])
    return markdown(["recipe", "weights", "when", "perplexity, or loss"], lines)


def _apart(value: float, exact: float | None) -> str:
    return "" if exact is None or exact == value else f" ({100 * (value / exact - 1):+.2f} %)"


if __name__ == "__main__":
    raise SystemExit(main())
