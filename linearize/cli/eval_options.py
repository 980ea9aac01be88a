"""Options of `linearize eval`."""

from __future__ import annotations

import argparse
from pathlib import Path

from linearize.cli import given


def add(parser: argparse.ArgumentParser) -> None:
    """What `eval` takes."""
    parser.add_argument("path", metavar="PATH", help=given.PATH_HELP)
    parser.add_argument(
        "--suite",
        default=["quick"],
        type=given.names,
        metavar="A,B",
        help="quick (minutes on two cores; default), standard, long, efficiency, all, or a suite of your own (a YAML "
        "file); of several one after the other",
    )
    parser.add_argument(
        "--against",
        metavar="MODEL",
        help="the teacher (default: what the checkpoint says that it was converted from)",
    )
    parser.add_argument(
        "--control",
        action="append",
        default=[],
        metavar="PATH",
        help="measure this checkpoint as well, such as the teacher trained the same way without surgery; repeatable",
    )
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="NAME=FILE",
        type=given.named_file,
        help="text to measure on (parquet, JSONL, txt); repeatable; default: the package's held-out sample",
    )
    parser.add_argument(
        "--only", type=given.names, default=[], metavar="A,B", help="these tasks of the suite alone"
    )
    parser.add_argument(
        "--roles",
        type=given.names,
        default=[],
        metavar="A,B",
        help="measure these alone: teacher, student, a control",
    )
    tasks = parser.add_argument_group("tasks of lm-eval")
    tasks.add_argument(
        "--tasks",
        type=given.names,
        default=[],
        metavar="A,B",
        help="any task or group of lm-eval, beside the suite or with `--suite tasks` alone; `all`: the five local ones",
    )
    tasks.add_argument(
        "--include-path",
        type=Path,
        metavar="DIR",
        help="folder with further task YAMLs, such as offline ones",
    )
    tasks.add_argument(
        "--task-data",
        type=Path,
        metavar="DIR",
        help="folder of the five local tasks' JSONL files, read offline",
    )
    tasks.add_argument(
        "--shots",
        type=given.count,
        metavar="N",
        help="worked examples before an item (default: as published, such as 5 for mmlu)",
    )
    tasks.add_argument(
        "--limit", type=given.positive, default=0, metavar="N", help="items of each task (default: all)"
    )
    parser.add_argument(
        "--out",
        type=given.folder,
        metavar="DIR",
        help="where results.json is kept (default: eval in the run folder, or runs/eval-NAME); what it holds is not "
        "measured again",
    )
    parser.add_argument(
        "--seed", type=given.count, default=0, metavar="N", help="of the items and the intervals (default: 0)"
    )
    given.device(parser)
