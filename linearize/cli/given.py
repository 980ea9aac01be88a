"""Values of options: numbers in their ranges, names of files and folders, lists; and no option twice."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from linearize.config.values import as_whole, quoted


def _number(kind: type, holds: Callable[[Any], bool], rule: str) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"must be {rule}, got '{text}'")
        return value

    return convert


_MOST = 2**31
"""No count that anybody means; torch and numpy end not far beyond."""
count = _number(int, lambda value: 0 <= value < _MOST, "a whole number, 0 or more and below 2^31")
positive = _number(int, lambda value: 1 <= value < _MOST, "a whole number above 0 and below 2^31")
window = _number(int, lambda value: 2 <= value < _MOST, "a whole number of at least 2")
not_negative = _number(float, lambda value: 0 <= value < float("inf"), "a number, 0 or more")
seconds = _number(float, lambda value: 0 < value <= 86_400, "a number of seconds above 0, at most a day")
port = _number(int, lambda value: 0 <= value < 2**16, "a port from 0 to 65535")
slots = _number(int, lambda value: 1 <= value <= 65_536, "a whole number from 1 to 65536")
share = _number(float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")

PATH_HELP = "exported checkpoint or run folder; also any MODEL"


def device(parser: argparse.ArgumentParser) -> None:
    """The option `--device`."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is one"
    )


def tokens(text: str) -> int:
    """A count of tokens as recipes write it: 20k, 1M."""
    value = as_whole(text)
    if value is None or not 0 <= value < _MOST:
        raise argparse.ArgumentTypeError(
            f"must be a whole number such as 20k, 0 or more and below 2^31, got '{text}'"
        )
    return value


LONGEST_NAME, LONGEST_PATH = 255, 4096
"""Bytes of one name, and of a path, on the file systems that people have."""


def folder(text: str) -> Path:
    """A path that a folder can have."""
    long = max((len(os.fsencode(part)) for part in Path(text).parts), default=0) > LONGEST_NAME
    if not text.strip() or "\0" in text or long or len(os.fsencode(text)) > LONGEST_PATH:
        raise argparse.ArgumentTypeError(
            f"must be the name of a folder, of at most {LONGEST_NAME} bytes a part and none of them zero, got "
            f"{quoted(text)}"
        )
    return Path(text)


def named_file(text: str) -> tuple[str, str]:
    """NAME=FILE."""
    name, equals, file = text.partition("=")
    if not equals or not name or not file:
        raise argparse.ArgumentTypeError(f"must be NAME=FILE, got '{text}'")
    return name, file


def lengths(text: str) -> tuple[int, ...]:
    """A,B as whole numbers."""
    return tuple(count(part) for part in text.split(",") if part.strip())


def names(text: str) -> list[str]:
    """A,B as a list. None at all, as of a variable that is not set, would be taken for the option left out."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError(
            f"must name at least one, got {quoted(text)}; leave the option out for its default"
        )
    return found


GIVEN = "_given"
"""Where a namespace keeps the options that were read, with their values."""


def stated(options: argparse.Namespace, *flags: str) -> list[str]:
    """Those of some options that the command line gives, be it with the value that they have without.

    Args:
        options: of `parse`.
        flags: such as "--seed"; also ones that take no value.
    """
    read = getattr(options, GIVEN, {})
    return [flag for flag in flags if (name := dest(flag)) in read or getattr(options, name) is True]


def dest(flag: str) -> str:
    """What a namespace calls an option."""
    return flag.removeprefix("--").replace("-", "_")


class Once(argparse._StoreAction):
    """An option with one value: of two, argparse would keep the last in silence."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        seen = namespace.__dict__.setdefault(GIVEN, {})
        if option_string is not None and self.dest in seen:
            raise argparse.ArgumentError(
                self, f"given twice ({seen[self.dest]!s:.60} and {values!s:.60}); it takes one value"
            )
        seen[self.dest] = values
        super().__call__(parser, namespace, values, option_string)
