"""Options of `linearize sample`."""

from __future__ import annotations

import argparse
from pathlib import Path

from linearize.cli import given
from linearize.config.schema import TeacherConfig

KINDS = (".parquet", ".jsonl")
USUAL = TeacherConfig()


def text_file(value: str) -> Path:
    """A path whose ending says in which form text goes into it."""
    path = given.folder(value)
    if path.suffix not in KINDS:
        raise argparse.ArgumentTypeError(f"must end with {' or '.join(KINDS)}, got '{value}'")
    return path


def chat(value: str) -> str | float:
    """auto, or a share."""
    if value == "auto":
        return value
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"must be auto, or a number from 0 to 1, got '{value}'")
    return share


def batch(value: str) -> str | int:
    """auto, or a count."""
    return value if value == "auto" else int(given.positive(value))


def add(parser: argparse.ArgumentParser, model_help: str) -> None:
    """The arguments; those of the writing are the fields of `data.teacher`."""
    parser.add_argument("model", metavar="MODEL", help=model_help)
    parser.add_argument(
        "--tokens", type=given.tokens, default=1_000_000, metavar="N", help="to keep at least (default: 1M)"
    )
    parser.add_argument(
        "--out",
        type=text_file,
        metavar="FILE",
        help=".parquet or .jsonl with the columns text, source, tokens (default: runs/MODEL-text.parquet)",
    )
    parser.add_argument(
        "--temperature",
        type=given.not_negative,
        default=USUAL.temperature,
        metavar="X",
        help=f"default: {USUAL.temperature}; 0 takes the likeliest token",
    )
    parser.add_argument(
        "--top-k",
        type=given.count,
        default=USUAL.top_k,
        metavar="K",
        help=f"draw from the K likeliest tokens (default: {USUAL.top_k}; 0: from all, which is slow)",
    )
    parser.add_argument(
        "--top-p",
        type=given.share,
        default=USUAL.top_p,
        metavar="X",
        help=f"and from this share of their mass (default: {USUAL.top_p})",
    )
    parser.add_argument(
        "--length",
        type=given.window,
        default=USUAL.length,
        metavar="TOKENS",
        help=f"of a document at most (default: {USUAL.length})",
    )
    parser.add_argument(
        "--chat",
        type=chat,
        default=USUAL.chat,
        metavar="SHARE",
        help="of the documents that are answers in the model's chat template (default: auto, 0.3 where it has one)",
    )
    parser.add_argument(
        "--batch",
        type=batch,
        default=USUAL.batch,
        metavar="N",
        help="documents written at once (default: auto, what fills the device)",
    )
    parser.add_argument(
        "--seed",
        type=given.count,
        default=USUAL.seed,
        metavar="N",
        help="of openings and draws (default: 0)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the step first: worth it for many tokens"
    )
