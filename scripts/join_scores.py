"""Scores of one model that several processes measured side by side, joined: the next `linearize eval` finds them there.

    linearize eval runs/mine --suite long --only text --out runs/mine-text &
    linearize eval runs/mine --suite long --only passkey --out runs/mine-passkey & wait
    python scripts/join_scores.py runs/mine/eval runs/mine-text runs/mine-passkey

With `--digits 5` a .json file has a line a row and so many digits of each number, for a repository.
With `--role teacher` only the teacher's are taken, so that the next conversion of it need not measure them again; a
.json file of rows, as docs/results has them, is a source as well, of what needs no files beside it: recall, decoding.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from linearize.errors import LinearizeError
from linearize.eval.rows import Score, Scores
from linearize.storing import write_file

BESIDE = ("tokens", "samples", "items")
"""What a measurement leaves beside its rows, each in files of its key."""


def main(arguments: list[str] | None = None) -> int:
    """Join, and say how many measurements came along."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "to", type=Path, help="folder of a results.json, or a .json file of rows alone; either may be missing"
    )
    parser.add_argument(
        "source", type=Path, nargs="+", help="folders that `linearize eval` wrote, or .json files of rows"
    )
    parser.add_argument("--role", help="rows of this role alone")
    parser.add_argument("--digits", type=int, metavar="N", help="of each number, with a .json file")
    options = parser.parse_args(arguments)
    if options.digits is not None and (options.to.suffix != ".json" or options.digits < 1):
        parser.error("--digits N takes a number above 0, and a .json file to write into")
    try:
        for source in options.source:
            found = join(options.to, source, options.role)
            print(f"{source}: {found} measurements")
        if options.digits is not None:
            shorten(options.to, options.digits)
    except LinearizeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def join(to: Path, source: Path, role: str | None = None) -> int:
    """Add what is not there yet.

    Args:
        to: folder, or .json file, which gets no files beside it.
        source: folder of a results.json, or a .json file of rows, which has no files beside it.
        role: whose; None takes all.

    Returns:
        How many measurements were added.

    Raises:
        LinearizeError: the source has no scores.
        CheckpointError: one of the two is damaged.
    """
    rows = source if source.suffix == ".json" else source / "results.json"
    if not rows.is_file():
        raise LinearizeError(
            f"{source} holds no results.json; name folders that `linearize eval` wrote, or a .json file of rows"
        )
    folder = None if to.suffix == ".json" else to
    (to.parent if folder is None else folder).mkdir(parents=True, exist_ok=True)
    target = Scores(to if folder is None else to / "results.json")
    have = {row.key for row in target.rows}
    bare = folder is not None and rows == source
    taken = [
        row
        for row in Scores(rows).rows
        if row.key not in have and role in (None, row.role) and (not bare or _stands_alone(row))
    ]
    keys = {row.key for row in taken}
    for name in BESIDE if folder is not None and not bare else ():
        for file in sorted((source / name).glob("*")):
            if file.name.partition(".")[0] in keys:
                (to / name).mkdir(exist_ok=True)
                shutil.copy2(file, to / name / file.name)
    target.add(taken)  # last: rows whose files are missing would never be measured again
    return len(keys)


def _stands_alone(row: Score) -> bool:
    """Whether a row needs no files beside it: tokens and items that others are held against, or texts to show."""
    return "lm-eval" not in row.version and row.task.split(":")[0] not in ("text", "generation")


def shorten(file: Path, digits: int) -> None:
    """Write a file of rows again, a line each, with so many digits of every number that is none of a count."""
    document = json.loads(file.read_text(encoding="utf-8"))
    rows = [
        {
            name: float(f"{value:.{digits}g}") if isinstance(value, float) else value
            for name, value in row.items()
        }
        for row in document["rows"]
    ]
    lines = ",\n".join(json.dumps(row, separators=(",", ":"), ensure_ascii=False) for row in rows)
    write_file(file, f'{{"format": {document["format"]}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    sys.exit(main())
