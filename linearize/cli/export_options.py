"""Options of `linearize export`."""

from __future__ import annotations

import argparse

from linearize.cli import given

FORMS = ("int8", "int4", "float8")
LAYOUTS = ("fla", "gguf")


def export(parser: argparse.ArgumentParser) -> None:
    """Beside the device."""
    parser.usage = (
        "%(prog)s PATH (--quantize int8|int4|float8 [--device auto|cpu|cuda] | --layout fla|gguf)"
        " [--out PATH]"
    )
    parser.add_argument("path", metavar="PATH", help="exported checkpoint or run folder")
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument(
        "--quantize",
        choices=FORMS,
        help="weights of linear layers as codes of torchao; mixers and their states stay float32",
    )
    form.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="as another library's own checkpoint, where its layer is the same function; else what differs is listed",
    )
    parser.add_argument(
        "--out",
        type=given.folder,
        metavar="PATH",
        help="the new checkpoint (default: <run>-<form>, <run>.gguf)",
    )
