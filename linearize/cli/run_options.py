"""Options of `linearize run`."""

from __future__ import annotations

import argparse

from linearize.cli import given
from linearize.config.budget import FORM, Budget, parse


def budget(value: str) -> Budget:
    """A time or a count of tokens."""
    try:
        return parse(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add(parser: argparse.ArgumentParser) -> None:
    """What there is beside MODEL, RECIPE and overrides."""
    parser.usage = "%(prog)s MODEL RECIPE [key=value ...] [--budget TIME|TOKENS] [--out DIR] [--resume]"
    parser.add_argument(
        "--budget",
        type=budget,
        metavar="TIME|TOKENS",
        help=f"scale the recipe's training to {FORM}; evaluation, calibration and reading or writing text are not "
        "in it (default: the recipe's own tokens)",
    )
    parser.add_argument(
        "--out", type=given.folder, metavar="DIR", help="run folder (default: runs/<model>-<recipe>)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run that this folder holds")
