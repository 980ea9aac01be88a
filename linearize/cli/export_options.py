"""Options of `linearize export`."""

from __future__ import annotations

import argparse

from linearize.cli import given

FORMS = ("int8", "int4", "float8")


def export(parser: argparse.ArgumentParser) -> None:
    """Beside the device."""
    parser.usage = "%(prog)s PATH --quantize int8|int4|float8 [--out DIR] [--device auto|cpu|cuda]"
    parser.add_argument("path", metavar="PATH", help="exported checkpoint or run folder")
    parser.add_argument(
        "--quantize",
        choices=FORMS,
        required=True,
        help="weights of linear layers as codes of torchao; mixers and their states stay float32",
    )
    parser.add_argument(
        "--out", type=given.folder, metavar="DIR", help="the new checkpoint (default: <run>-<form>)"
    )
