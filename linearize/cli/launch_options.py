"""Options of `linearize launch`."""

from __future__ import annotations

import argparse

from linearize.cli import run_options


def add(parser: argparse.ArgumentParser) -> None:
    """What there is beside PRESET, MODEL, RECIPE and overrides."""
    run_options.add(parser)
    parser.usage = (
        "%(prog)s PRESET MODEL RECIPE [key=value ...] [--set KEY=VALUE ...] [--budget TIME|TOKENS] [--out DIR] "
        "[--resume] [--dry-run]"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a field of the preset, such as processes=4 or hydra.launcher.partition=gpu",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be started, and start nothing")
