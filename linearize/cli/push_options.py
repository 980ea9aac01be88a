"""Options of `linearize push`."""

from __future__ import annotations

import argparse


def push(parser: argparse.ArgumentParser) -> None:
    """All of them."""
    parser.usage = "%(prog)s PATH REPO [--dry-run] [--private] [--license NAME] [--base-model ID]"
    parser.add_argument("path", metavar="PATH", help="exported checkpoint or run folder")
    parser.add_argument(
        "repo", metavar="REPO", help="owner/model on the Hugging Face hub; made if it is not there"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show what would go, and the card, and end as a push would; needs no network",
    )
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument(
        "--license",
        metavar="NAME",
        help="as the hub writes it, such as apache-2.0 (default: the base model's, if known)",
    )
    parser.add_argument(
        "--base-model", metavar="ID", help="hub id of what was converted (default: what the checkpoint says)"
    )
