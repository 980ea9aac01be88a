"""Options of `linearize plan`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from linearize.cli import given


def plan(parser: argparse.ArgumentParser, arguments: Callable[[Any], None]) -> None:
    """Of `plan`."""
    arguments(parser)
    parser.usage = "%(prog)s MODEL RECIPE [key=value ...] [--gpus 8xH100] [--batch N] [--price X] [--json]"
    parser.epilog = (
        "MODEL may also be the name of a shape: smollm2-135m, llama-3.2-1b, llama-3-8b, llama-3-70b, llama-3-405b, "
        "qwen3-32b"
    )
    parser.add_argument(
        "--gpus", default="h100", metavar="NxCARD", help="how many of which card (default: one h100)"
    )
    parser.add_argument(
        "--batch",
        type=given.positive,
        metavar="N",
        help="sequences of a step in every stage (default: the recipe's)",
    )
    parser.add_argument(
        "--price", type=given.not_negative, metavar="X", help="US dollars a card and hour (default: 3)"
    )
    parser.add_argument("--json", action="store_true", help="numbers alone: bytes, FLOPs, hours")
