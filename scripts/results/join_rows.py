"""Rows of `linearize bench recipes|decode|train` that were measured elsewhere, joined into a file of docs/results.

    cd docs/results
    python ../../scripts/results/join_rows.py recipes-h200.json CARD0/recipes.json CARD1/recipes.json --commit dd86310
    python ../../scripts/results/join_rows.py train-h200.json RUN/train.json --commit dd86310 --beside

A row takes the place of older ones of the same measurement (`linearize.bench.whole.KEY`), unless `--beside` keeps them.
Rows of one call stand beside one another: two cards have a teacher each, and `card` says which it was. What was not
measured (out of memory, no time) takes nothing's place, and is left out where there is a number.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from linearize.bench.whole import KEY, Row, read, write
from linearize.errors import LinearizeError


def main(arguments: list[str] | None = None) -> int:
    """Join, and say how many rows came and went."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("to", type=Path, help="a .json file of rows; may be missing")
    parser.add_argument("source", type=Path, nargs="+", help="such files, one for each card")
    parser.add_argument("--commit", required=True, help="of what was measured")
    parser.add_argument("--beside", action="store_true", help="keep older rows of the same measurement")
    options = parser.parse_args(arguments)
    try:
        missing = [str(path) for path in options.source if not path.is_file()]
        if missing:
            raise LinearizeError(
                f"{', '.join(missing)}: no such file; name files that `linearize bench` wrote"
            )
        before = read(options.to)
        new = [
            {**row, "commit": options.commit, **({"card": card} if len(options.source) > 1 else {})}
            for card, path in enumerate(options.source)
            for row in read(path)
        ]
        rows = joined(before, new, beside=options.beside)
        write(options.to, rows)
    except LinearizeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    came = sum(row in new for row in rows)
    print(f"{options.to}: {came} rows came, {len(before) + came - len(rows)} went, {len(rows)} are there")
    return 0


def joined(before: list[Row], new: list[Row], *, beside: bool = False) -> list[Row]:
    """The rows of before that stay, and behind them the new ones.

    Args:
        before: may hold what an earlier call joined of the same commit: it is joined once.
        new: each with its commit.
        beside: keep rows of other commits.
    """
    known = {_key(row) for row in before if _number(row)} | {_key(row) for row in new if _number(row)}
    new = [row for row in new if _number(row) or _key(row) not in known]
    coming = {_key(row) for row in new}
    again = {(_key(row), row["commit"]) for row in new}
    stays = [
        row
        for row in before
        if (_key(row), row.get("commit")) not in again and (beside or _key(row) not in coming)
    ]
    return [*stays, *new]


def _key(row: Row) -> tuple[object, ...]:
    return tuple(row.get(name) for name in KEY)


def _number(row: Row) -> bool:
    """Whether something was measured: tokens a second, or the kernels of a profile."""
    return bool(row.get("tokens_per_second") or row.get("longest"))


if __name__ == "__main__":
    sys.exit(main())
