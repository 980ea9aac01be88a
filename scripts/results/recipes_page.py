"""The tables of docs/results/recipes-h200.md, from recipes-h200.json and recipes-profile-h200.json beside it.

python scripts/results/recipes_page.py            # writes what stands between the page's marks
python scripts/results/recipes_page.py --missing dd86310    # which recipes have no row of a commit
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from linearize.bench.decode_recipes import NEWEST
from linearize.bench.subjects import TEACHER, subjects
from linearize.bench.training_step import CAPTURED, COMPILED
from linearize.bench.whole import Row, read

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
PAGE, ROWS, PROFILES = "recipes-h200.md", "recipes-h200.json", "recipes-profile-h200.json"
SHAPE, BATCHES, LENGTH, CONTEXT = "smollm2-135m", (64, 16), 1024, 8192
LEAST, MOST_GIB, TIMES = 120_000, 20, 10
"""Issue 10's targets: tokens/s at 64 x 1,024, GiB at 16 x 1,024, times the compiled teacher in decoding."""
STEP = "graph, compiled"
"""The way of decoding that the target is about; the teacher's is transformers' own attention."""
OPERATIONS = "graph"
"""The step that is recorded and not compiled."""
PROMPTS = (1024, 8192, 65_536)
BANDWIDTH = 4.25e12
"""Bytes a second that a copy of 1 GiB reaches on an H200 (docs/kernels.md)."""


def main(arguments: list[str] | None = None) -> int:
    """Write the page's tables, or say what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--missing", metavar="COMMIT", help="name recipes without rows of this commit, write nothing"
    )
    options = parser.parse_args(arguments)
    rows = read(RESULTS / ROWS)
    if options.missing:
        for batch in BATCHES:
            print(
                f"no training row at {batch} x {LENGTH:,}: {_without(trained(rows, batch), options.missing)}"
            )
        print(f"no decoding row at 64 x {CONTEXT:,}: {_without(decoded(rows), options.missing)}")
        return 0
    path = RESULTS / PAGE
    path.write_text(
        written(path.read_text(encoding="utf-8"), rows, read(RESULTS / PROFILES)), encoding="utf-8"
    )
    return 0


def written(page: str, rows: list[Row], profiles: list[Row]) -> str:
    """The page with its tables made anew; what stands outside of the marks stays.

    Args:
        page: text in which each table stands between `<!-- NAME -->` and `<!-- /NAME -->`.
        rows, profiles: of the two files.

    Raises:
        ValueError: the page has no marks of a table.
    """
    tables = {
        "training": training(rows),
        "decoding": decoding(rows),
        "steps": steps(rows),
        "prompts": prompts(rows),
        "decoding profiles": decoding_profiles(rows, profiles),
        "training profiles": training_profiles(profiles),
    }
    for name, table in tables.items():
        page, found = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda mark, table=table: mark[1] + table + mark[2],
            page,
            flags=re.S,
        )
        if found != 1:
            raise ValueError(f"{PAGE} has {found} places for {name}")
    return page


def trained(rows: list[Row], batch: int) -> dict[str, Row]:
    """Recipe -> its newest measured training row at a batch; recorded ones first, and compiled ones of these."""
    found: dict[str, Row] = {}
    for row in rows:
        known = found.get(row["recipe"], row)
        if (
            (row["measured"], row["shape"], row["batch"], row["length"]) == ("train", SHAPE, batch, LENGTH)
            and row["tokens_per_second"]
            and row["recipe"] != TEACHER
            and _rank(row) >= _rank(known)
        ):
            found[row["recipe"]] = row
    return found


def decoded(rows: list[Row], way: str = STEP, batch: int = 64) -> dict[str, Row]:
    """Recipe, or the teacher -> its newest decoding row of a way."""
    return _newest(rows, ("decode", SHAPE, way, batch, CONTEXT))


def _newest(rows: list[Row], kind: tuple[Any, ...]) -> dict[str, Row]:
    """Recipe, or the teacher -> its newest row of a measurement, shape, way, batch and length."""
    keys = ("measured", "shape", "way", "batch", "length")
    return {
        row["recipe"]: row
        for row in rows
        if tuple(row[key] for key in keys) == kind and row["tokens_per_second"]
    }


def training(rows: list[Row]) -> str:
    """Both batches of every recipe, the fastest first; before them teachers, of each card and way."""
    both = [trained(rows, batch) for batch in BATCHES]
    titles = ["recipe"]
    for batch in BATCHES:
        titles += [f"{batch} x {LENGTH:,}: tokens/s", "x", "GiB"]
    lines = []
    teachers: dict[str, dict[tuple[int, int], Row]] = {}
    for row in rows:
        kind = (row["recipe"], row["measured"], row["shape"], row["length"])
        if kind == (TEACHER, "train", SHAPE, LENGTH) and _recorded(row) and row["tokens_per_second"]:
            card = f", card {row['card']}" if "card" in row else ""
            teachers.setdefault(f"{TEACHER}{card}", {})[row["batch"], _rank(row)] = row
    for name in sorted(teachers):
        for rank in sorted({rank for _, rank in teachers[name]}, reverse=True):
            lines.append(
                [name, *(cell for batch in BATCHES for cell in _step(teachers[name].get((batch, rank))))]
            )
    names = sorted(set(both[0]) | set(both[1]), key=lambda name: (-_speed(both[0].get(name)), name))
    for name in names:
        cells = [*_step(both[0].get(name)), *_step(both[1].get(name))]
        if 0 < _speed(both[0].get(name)) < LEAST:
            cells[0] = f"**{cells[0]}**"
        if name in both[1] and both[1][name]["peak_gib"] > MOST_GIB:
            cells[5] = f"**{cells[5]}**"
        lines.append([name, *cells])
    return _table(titles, lines)


def decoding(rows: list[Row]) -> str:
    """The compiled step of every recipe as a multiple of the compiled teacher's, the fastest first."""
    found = decoded(rows)
    teacher = found[TEACHER]["tokens_per_second"]
    by_kernel = decoded(rows, STEP + NEWEST).get(TEACHER)
    if by_kernel is not None:
        found[f"{TEACHER}{NEWEST}"] = by_kernel
    lines = []
    for name, row in sorted(found.items(), key=lambda pair: -pair[1]["tokens_per_second"]):
        times = row["tokens_per_second"] / teacher
        shown = f"{times:.1f}" if times >= TIMES or row["recipe"] == TEACHER else f"**{times:.1f}**"
        speed = _rate(row)
        lines.append(
            [name, speed, shown, f"{row['milliseconds']:.2f}", f"{row['peak_gib']:.2f}", row["commit"]]
        )
    return _table(["recipe", "tokens/s", "x", "ms a token", "GiB", "commit"], lines)


def steps(rows: list[Row]) -> str:
    """One captured step of the model's own operations, of one text and of 64, as a multiple of the teacher's."""
    both = [decoded(rows, OPERATIONS, batch) for batch in (1, 64)]
    lines = []
    for name in _names(*both):
        cells = []
        for found in both:
            row, teacher = found.get(name), found[TEACHER]
            times = "" if row is None or row.get("note") else f"{_speed(row) / _speed(teacher):.2f}"
            cells += [_rate(row), times]
        memory = f"{both[1][name]['peak_gib']:.2f}" if name in both[1] else ""
        lines.append([name, *cells, memory])
    return _table(["recipe", "batch 1", "x", "batch 64", "x", "GiB at 64"], lines)


def prompts(rows: list[Row]) -> str:
    """Tokens/s of reading one prompt."""
    found = [_newest(rows, ("prefill", SHAPE, "chunked", 1, length)) for length in PROMPTS]
    lines = [[name, *(_rate(each.get(name)) for each in found)] for name in _names(*found)]
    return _table(["recipe", *(f"{length:,}" for length in PROMPTS)], lines)


def _names(*found: dict[str, Row]) -> list[str]:
    """The teacher, and recipes by name."""
    return [TEACHER, *sorted({name for each in found for name in each} - {TEACHER})]


def _rate(row: Row | None) -> str:
    """Tokens/s; a row with a note was measured beside something else."""
    return "" if row is None else f"{row['tokens_per_second']:,.0f}{BESIDE if row.get('note') else ''}"


def decoding_profiles(rows: list[Row], profiles: list[Row]) -> str:
    """Where a token's time goes, in ms, beside the bytes that it cannot do without."""
    kept = {(row["recipe"], row["commit"]): row for row in decoded(rows).values()}
    titles = [
        "recipe",
        "step",
        "floor",
        "kernels",
        "busy",
        *KINDS,
        "not of the 12 longest",
        "longest, ms (times)",
    ]
    lines = []
    for profile in sorted(
        (one for one in profiles if (one["measured"], one["way"]) == ("decode", STEP)),
        key=lambda one: one["milliseconds"] / one["tokens"],
    ):
        tokens = profile["tokens"]
        row = kept[profile["recipe"], profile["commit"]]
        floor = 1e3 * (profile["weights_mib"] + row["cache_mib"]) * 2**20 / BANDWIDTH
        lines.append(
            [
                profile["recipe"],
                f"{profile['milliseconds'] / tokens:.2f}",
                f"{floor:.2f}",
                f"{profile['kernels'] / tokens:,.0f}",
                f"{100 * profile['busy']:.0f} %",
                *_kinds(profile, tokens, 2),
                _longest(profile, tokens, 2),
            ]
        )
    return _table(titles, lines)


def training_profiles(profiles: list[Row]) -> str:
    """Where a training step's time goes, in ms."""
    titles = ["recipe", "batch", "step", "all kernels", "kernels", "busy", *KINDS, "not of the 12 longest"]
    titles += ["longest, ms (times)"]
    lines = [
        [
            profile["recipe"],
            str(profile["batch"]),
            f"{profile['milliseconds']:.0f}",
            f"{profile['busy_milliseconds']:.0f}",
            f"{profile['kernels']:,}",
            f"{100 * profile['busy']:.0f} %",
            *_kinds(profile, 1, 0),
            _longest(profile, 1, 0),
        ]
        for profile in sorted(profiles, key=lambda one: (one["recipe"], -one["batch"]))
        if profile["measured"] == "train"
    ]
    return _table(titles, lines)


BESIDE = " †"
"""Of a row that was measured beside other work on the card: a lower bound."""
PARTS = " °"
"""Of a row whose model ran norms, rotary embeddings and feed-forward layers one operation after the other."""
KINDS = ("ours", "products", "torch's attention", "fused by torch", "torch's own")


def kind(name: str) -> str:
    """Of `KINDS`, what a kernel of that name is."""
    if name.startswith("triton_"):
        return "fused by torch"
    if "sdpa" in name or "flash_fprop" in name or "flash_bprop" in name:
        return "torch's attention"
    if any(part in name for part in ("nvjet", "cutlass", "cublas", "gemm", "splitK")):
        return "products"
    return "torch's own" if "at::native" in name else "ours"


def short(name: str) -> str:
    """A kernel's name as far as it says what it is."""
    if kind(name) == "products":
        return "product"
    if kind(name) == "torch's attention":
        return "cuDNN's attention"
    if name.startswith("triton_"):
        return (
            "fused: "
            + " ".join(part for part in name.split("_")[3:] if part and not part.isdigit())[:44].strip()
        )
    if "at::native" in name:
        plain = name.replace("void at::native::", "")
        inner = re.search(r"(BinaryFunctor<[\w:]+|CUDAFunctor_add<[\w:]+|direct_copy|ReduceOp<[\w:]+)", name)
        return f"{plain.split('<')[0]} {inner[1] if inner else ''}".strip().replace("c10::", "")
    return name


def _kinds(profile: Row, calls: int, digits: int) -> list[str]:
    spent = dict.fromkeys(KINDS, 0.0)
    for kernel in profile["longest"]:
        spent[kind(kernel["name"])] += kernel["milliseconds"] / calls
    rest = profile["busy_milliseconds"] / calls - sum(spent.values())
    return [f"{value:.{digits}f}" if value else "" for value in spent.values()] + [f"{rest:.{digits}f}"]


def _longest(profile: Row, calls: int, digits: int) -> str:
    said = [
        f"{short(kernel['name'])} {kernel['milliseconds'] / calls:.{digits}f} ({kernel['count'] / calls:.0f})"
        for kernel in profile["longest"][:5]
    ]
    return "; ".join(said).replace("|", "&#124;").replace("<", "&lt;")


def _without(found: dict[str, Row], commit: str) -> str:
    names = [name for name in subjects() if found.get(name, {}).get("commit") != commit]
    return ", ".join(names) or "none"


def _recorded(row: Row) -> bool:
    return CAPTURED in row["way"]


def _rank(row: Row) -> int:
    """How near to a run's own steps it was measured: recorded, and with compiled blocks."""
    return 2 * _recorded(row) + (COMPILED in row["way"])


def _speed(row: Row | None) -> float:
    return float(row["tokens_per_second"]) if row else 0.0


def _step(row: Row | None) -> list[str]:
    if row is None:
        return ["", "", ""]
    older = f" ({row['commit']})" if not _recorded(row) else PARTS if COMPILED not in row["way"] else ""
    ratio = "" if row.get("ratio") is None else f"{row['ratio']:.2f}"
    return [f"{_rate(row)}{older}", ratio, f"{row['peak_gib']:.1f}"]


def _table(titles: list[str], lines: list[list[str]]) -> str:
    head = ["---", *("---:" if title != "longest, ms (times)" else "---" for title in titles[1:])]
    return "".join(f"| {' | '.join(line)} |\n" for line in [titles, head, *lines])


if __name__ == "__main__":
    sys.exit(main())
