"""Options of `linearize blocks`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from linearize.cli import given

STEPS = {
    "plan": "disk, memory and hours, by the size of a block",
    "write": "write what each block is trained on",
    "train": "train blocks that are written, as many workers at once as you like",
    "join": "put them together; the run goes on from there",
}
OUT = "run folder (default: runs/<model>-<recipe>)"


def plan(parser: argparse.ArgumentParser, arguments: Callable[[Any], None]) -> None:
    """Of `blocks plan`."""
    arguments(parser)
    parser.usage = "%(prog)s MODEL RECIPE [key=value ...] [--gpus 8xH100]"
    parser.epilog = "MODEL may also be the name of a shape, as for linearize plan"
    parser.add_argument(
        "--gpus",
        default="h100",
        metavar="NxCARD",
        help="how many of which card work at once (default: one h100)",
    )


def write(parser: argparse.ArgumentParser, arguments: Callable[[Any], None]) -> None:
    """Of `blocks write`."""
    arguments(parser)
    parser.usage = "%(prog)s MODEL RECIPE [key=value ...] [--out DIR] [--layers K] [--keep N] [--streams DIR]"
    _out(parser)
    parser.add_argument(
        "--layers",
        type=given.positive,
        metavar="K",
        help="layers of a block (default: 1, or those of the folder): fewer streams, more memory",
    )
    parser.add_argument(
        "--keep",
        type=given.positive,
        metavar="N",
        help="streams on the disk at most; give the command again when their blocks are trained (default: all)",
    )
    parser.add_argument(
        "--streams",
        type=given.folder,
        metavar="DIR",
        help="where they go (default: streams in the run folder)",
    )


def train(parser: argparse.ArgumentParser, arguments: Callable[[Any], None]) -> None:
    """Of `blocks train`."""
    arguments(parser)
    parser.usage = "%(prog)s MODEL RECIPE [key=value ...] [--out DIR] [--blocks 0-9]"
    _out(parser)
    parser.add_argument(
        "--blocks", metavar="A-B,C", help="these alone (default: whatever is written and nobody else is at)"
    )


def join(parser: argparse.ArgumentParser, arguments: Callable[[Any], None]) -> None:
    """Of `blocks join`."""
    arguments(parser)
    parser.usage = "%(prog)s MODEL RECIPE [key=value ...] [--out DIR] [--keep-streams] [--export]"
    _out(parser)
    parser.add_argument("--keep-streams", action="store_true", help="leave the streams on the disk")
    parser.add_argument(
        "--export",
        action="store_true",
        help="write the checkpoint tensor by tensor, where the recipe has no other stages",
    )


def _out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=given.folder, metavar="DIR", help=OUT)
