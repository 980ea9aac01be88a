"""The table (terminal and markdown) and the JSON of a benchmark."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from linearize import storing
from linearize.bench.clock import Ceilings, Timing, to_dict
from linearize.bench.runner import Row, floors
from linearize.eval import tables
from linearize.version import __version__

PACKAGES = ("torch", "triton", "fla-core", "transformers")
WIDTHS = (30, 13, 7, 6, 13, 7, 6, 8)
SKIPPED = "not timed at this length (--peers-at)"
WRONG = 0.05
"""Relative error of a bfloat16 kernel above which its time means nothing."""
HEADER = ("", "forward ms", "/ floor", "/ ours", "fwd + bwd ms", "/ floor", "/ ours", "peak MiB")


def given(options: argparse.Namespace) -> dict[str, Any]:
    """The options of a command, for `facts`."""
    own = ("parser", "command", "line", "out")
    # what a parser keeps for itself begins with an underscore
    return {name: value for name, value in vars(options).items() if name not in own and name[0] != "_"}


def facts(device: dict[str, Any], ceilings: Ceilings | None, options: dict[str, Any]) -> dict[str, Any]:
    """What a reader must know to judge the numbers: device, versions, command, date, and the measured ceilings."""
    versions = {"linearize": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    found: dict[str, Any] = {
        "device": device,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["linearize", *sys.argv[1:]]),
        "versions": versions,
        "options": options,
    }
    if ceilings is not None:
        found["ceilings"] = {
            "copy_tb_per_s": round(ceilings.bandwidth / 1e12, 3),
            "bf16_matmul_tflop_per_s": round(ceilings.operations / 1e12, 1),
        }
    return found


def to_json(rows: Sequence[Row], ceilings: Ceilings) -> list[dict[str, Any]]:
    """One flat entry a row: times in milliseconds, floors, ratios and the notes."""
    found = []
    for row in rows:
        (forward_floor, forward_by), (both_floor, both_by) = floors(row, ceilings)
        mine = _ours(rows, row)
        found.append(
            {
                "operator": row.case.operator,
                "size": row.case.size,
                "length": row.case.length,
                "contender": row.contender.name,
                "kind": row.contender.kind,
                "forward_ms": to_dict(row.forward),
                "both_ms": to_dict(row.both),
                "forward_note": row.forward_note,
                "both_note": row.both_note,
                "forward_floor_ms": round(forward_floor, 5),
                "both_floor_ms": round(both_floor, 5),
                "floor_set_by": [forward_by, both_by],
                "forward_to_floor": _ratio(row.forward, forward_floor),
                "both_to_floor": _ratio(row.both, both_floor),
                "forward_to_ours": _ratio(row.forward, mine.forward),
                "both_to_ours": _ratio(row.both, mine.both),
                "relative_error": row.error if row.error is None else f"{row.error:.2e}",
                "peak_mib": None if row.peak_mib is None else round(row.peak_mib, 1),
                "seconds": round(row.seconds, 1),
                **({} if row.tuned_among is None else {"tuned_among": row.tuned_among}),
            }
        )
    return found


def write_json(path: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """All of it in one file, written whole or not at all."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def lines(rows: Sequence[Row], ceilings: Ceilings) -> list[tuple[str, list[list[str]]]]:
    """For each case its heading and a line of cells for each contender."""
    found = []
    for case in dict.fromkeys(row.case for row in rows):
        mine = [row for row in rows if row.case is case]
        (forward_floor, _), (both_floor, _) = floors(mine[0], ceilings)
        heading = f"{case.operator}: {case.size}; floor {milliseconds(forward_floor)} / {milliseconds(both_floor)} ms"
        cells = []
        for row in mine:
            ours = _ours(rows, row)
            cells.append(
                [
                    row.contender.name,
                    _cell(row.forward, row.forward_note),
                    _times(_ratio(row.forward, forward_floor)),
                    _times(_ratio(row.forward, ours.forward)),
                    _cell(row.both, row.both_note),
                    _times(_ratio(row.both, both_floor)),
                    _times(_ratio(row.both, ours.both)),
                    "" if row.peak_mib is None else f"{row.peak_mib:,.0f}",
                ]
            )
        found.append((heading, cells))
    return found


def notes(rows: Sequence[Row]) -> list[str]:
    """How far ours is from float32, remarks, and why there is no number where there is none; each once."""
    found = [f"{row.case.operator}: {row.case.remark}" for row in rows if row.case.remark]
    for row in rows:
        if row.tuned_among is not None and row.forward is not None:
            found.append(
                f"{row.contender.name}: tuned among {row.tuned_among} configurations of each kernel "
                "(--peer-configurations), not all of its own"
            )
        if row.error is not None:
            known = f"output and gradients within {100 * row.error:.2g} % of the torch form in float32"
            found.append(f"{row.case.operator}: {known if row.error < WRONG else 'WRONG RESULTS, ' + known}")
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        for note in (row.forward_note, row.both_note):
            if note and not note.startswith(SKIPPED):
                reasons.setdefault((row.contender.name, note), {})[row.case.operator] = None
    found += [f"{name} ({', '.join(where)}): {note}" for (name, note), where in reasons.items()]
    return [*dict.fromkeys(found), f"-: {SKIPPED}"]


def text(rows: Sequence[Row], ceilings: Ceilings) -> str:
    """The table in plain lines of fixed columns, and the notes below."""
    out = [_fixed(HEADER)]
    for heading, cells in lines(rows, ceilings):
        out += [heading, *(_fixed(["  " + line[0], *line[1:]]) for line in cells)]
    return "\n".join([*out, "", *notes(rows)])


def markdown(about: dict[str, Any], rows: Sequence[Row], ceilings: Ceilings) -> str:
    """A page with the command, the ceilings, the table and the notes."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    empty = " |" * (len(HEADER) - 1)
    out = [
        "# Kernels side by side",
        "",
        f"{about['device'].get('name', 'unknown device')}; {versions}; {about['date']}.",
        "",
        f"```\n{about['command']}\n```",
        "",
        f"Ceilings measured in the same run: a copy moves {ceilings.bandwidth / 1e12:.2f} TB/s (bytes read and "
        f"written), a bf16 matrix product runs at {ceilings.operations / 1e12:.0f} TFLOP/s. The floor is the larger of "
        "the fewest bytes over the first and the fewest operations over the second. Median of repeats on the GPU, L2 "
        "flushed; `/ ours` above 1 is slower than linearize. `h`: launched alone, the host takes longer than the GPU. "
        "Softmax is another function, there to compare times; its floor is not this one. docs/kernels.md says more.",
        "",
        "| " + " | ".join(("contender", *HEADER[1:])) + " |",
        "| --- |" + " ---: |" * (len(HEADER) - 1),
    ]
    for heading, cells in lines(rows, ceilings):
        out.append(f"| **{_quiet(heading)}** |{empty}")
        out += ["| " + " | ".join(_quiet(cell) for cell in line) + " |" for line in cells]
    return "\n".join([*out, "", *(f"- {_quiet(note)}" for note in notes(rows))]) + "\n"


def milliseconds(value: float) -> str:
    """Three digits: 0.183, 2.19, 13.9, 104."""
    decimals = 3 if value < 0.9995 else 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f}"


def _fixed(cells: Sequence[str]) -> str:
    first, *rest = zip(cells, WIDTHS, strict=True)
    return (f"{first[0]:<{first[1]}}" + "".join(f" {cell:>{width}}" for cell, width in rest)).rstrip()


def _cell(timing: Timing | None, note: str) -> str:
    if timing is not None:
        return milliseconds(timing.median) + (" h" if timing.host > timing.median else "")
    return "-" if not note or note.startswith(SKIPPED) else note.split(":")[0].split(" in ")[0]


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _ratio(timing: Timing | None, base: Timing | float | None) -> float | None:
    base = base.median if isinstance(base, Timing) else base
    return None if timing is None or not base else round(timing.median / base, 3)


def _ours(rows: Sequence[Row], row: Row) -> Row:
    same = [other for other in rows if other.case is row.case]
    return next((other for other in same if other.contender.kind == "ours"), same[0])


def _quiet(note: str) -> str:
    return note.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")


def write_rows(folder: Path, stem: str, about: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Rows of any columns as ``stem``.json and ``stem``.md; for benchmarks without floors, such as decoding.

    Args:
        folder: made if it is not there.
        stem: "decode".
        about: of `facts`.
        rows: all with the same columns, in order.

    Returns:
        The table in markdown.
    """
    storing.make_folder(folder)
    write_json(folder / f"{stem}.json", about, list(rows))
    table = tables.markdown(rows)
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    head = f"{about['device'].get('name', 'CPU')}; {versions}; {about['date']}.\n\n```\n{about['command']}\n```\n\n"
    (folder / f"{stem}.md").write_text(f"# {stem.capitalize()}\n\n{head}{table}\n", encoding="utf-8")
    return table
