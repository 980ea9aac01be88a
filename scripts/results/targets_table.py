"""The targets of best_constant and best_hybrid beside what runs came to: the table of docs/results/best-h200.md.

    python scripts/results/targets_table.py best_constant=keep/best_constant best_hybrid=keep/best_hybrid \\
        --judged keep/targets keep/far keep/tasks

Of each run its own perplexities and speed; of the judge the folders NAME, the run folder's name, in each of `--judged`,
and the run's own `eval`. What was not measured has no figure. Perplexities are of the text `wikitext2`, KL of `books`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from conversions import figures  # noqa: E402
from sheet import markdown  # noqa: E402

from linearize.eval.ablation import NO_LINEAR  # noqa: E402
from linearize.eval.rows import STUDENT, TEACHER, Score, Scores  # noqa: E402
from linearize.eval.summary import is_beyond  # noqa: E402

TASKS = ("piqa", "arc_easy", "arc_challenge", "winogrande")
FAR, NEAR = "16384-32768", "1024-2048"
"""Tokens of a text whose perplexities are compared."""


@dataclass(frozen=True)
class Run:
    """A run and all that was measured of it.

    Attributes:
        folder: of the run.
        scores: of the judge, teacher and controls among them.
    """

    folder: Path
    scores: Sequence[Score]

    def kept(self, key: str) -> float | None:
        """The student's figure over the teacher's."""
        own, teacher = (figures(self.scores, role).get(key) for role in (STUDENT, TEACHER))
        return own / teacher if own is not None and teacher else None

    def of(self, key: str, role: str = STUDENT) -> float | None:
        """A figure of `conversions.figures`."""
        return figures(self.scores, role).get(key)

    def own(self, text: str) -> tuple[float, float] | None:
        """The run's own perplexities of a text, the student's after its last stage and the teacher's."""
        rows = json.loads((self.folder / "results.json").read_text())["rows"]
        after = [row for row in rows if row["name"].startswith("after ")]
        teacher = next(row for row in rows if row["name"] == "teacher")
        if not after or text not in teacher["perplexity"]:
            return None
        return after[-1]["perplexity"][text], teacher["perplexity"][text]

    def at(self, bucket: str, role: str = STUDENT) -> float | None:
        """Perplexity at some positions of the longest text of books."""
        found = [
            score
            for score in self.scores
            if (score.role, score.metric, score.by, score.bucket) == (role, "ppl", "position", bucket)
            and (score.length or 0) >= int(FAR.split("-")[1])
            and "wikitext2" not in score.task
        ]
        return found[0].value if found else None

    @property
    def seconds(self) -> float:
        """Of training: the tokens of each stage and length over the median speed of its lines.

        The first steps of each compile and record, and other work may stand beside some, so that a sum of all lines
        is longer.
        """
        before: dict[str, int] = {}
        tokens: dict[tuple[str, int], int] = {}
        speeds: dict[tuple[str, int], list[float]] = {}
        for line in map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines()):
            stage = line["stage"]
            kind = (stage, line.get("length", 0))
            tokens[kind] = tokens.get(kind, 0) + line["tokens"] - before.get(stage, 0)
            speeds.setdefault(kind, []).append(line["tokens_per_second"])
            before[stage] = line["tokens"]
        return sum(tokens[kind] / median(speeds[kind]) for kind in tokens)


@dataclass(frozen=True)
class Target:
    """A row of the table.

    Attributes:
        says: what is measured.
        wanted: of best_constant, of best_hybrid; as it is written.
        met: whether a figure does; of both.
        figure: of a run, None where nothing was measured.
        show: it as text.
    """

    says: str
    wanted: tuple[str, str]
    met: tuple[Callable[[float], bool], Callable[[float], bool]]
    figure: Callable[[Run], float | None]
    show: str = "{:.3f}"


def most(constant: float, hybrid: float) -> tuple[Callable[[float], bool], Callable[[float], bool]]:
    """Met by figures of at most so much."""
    return (lambda x: x <= constant), (lambda x: x <= hybrid)


def least(constant: float, hybrid: float) -> tuple[Callable[[float], bool], Callable[[float], bool]]:
    """Met by figures of at least so much."""
    return (lambda x: x >= constant), (lambda x: x >= hybrid)


def ratio(run: Run) -> float | None:
    """WikiText-2 perplexity over the teacher's."""
    found = run.own("wikitext2")
    return found[0] / found[1] if found else None


def recalled(text: str, *, beyond: bool = False) -> Callable[[Run], float | None]:
    """Nats above the teacher at tokens whose pair with the one before stands earlier in the window.

    Args:
        text: its name.
        beyond: of those alone whose pair lies behind the window of 64 tokens.
    """

    def figure(run: Run) -> float | None:
        found = {
            score.role: score.value
            for score in run.scores
            if score.task == f"text: {text}"
            and (score.metric, score.length) == ("ppl_hit", 1024)
            and (is_beyond(score) if beyond else not score.by)
        }
        return log(found[STUDENT] / found[TEACHER]) if {STUDENT, TEACHER} <= found.keys() else None

    return figure


def four(run: Run) -> float | None:
    """Mean accuracy of the four tasks over the teacher's."""
    own, teacher = ([run.of(f"task {task}", role) for task in TASKS] for role in (STUDENT, TEACHER))
    if None in own or None in teacher:
        return None
    return 100 * mean(x for x in own if x is not None) / mean(x for x in teacher if x is not None)


def far(run: Run) -> float | None:
    """Perplexity of books at 16K to 32K tokens over that at 1K to 2K."""
    there, here = run.at(FAR), run.at(NEAR)
    return there / here if there and here else None


def branch(run: Run) -> float | None:
    """Perplexity of WikiText-2 without the recurrent branch over with it."""
    off, on = run.of("ppl wikitext2 1024", NO_LINEAR), run.of("ppl wikitext2 1024")
    return off / on if off and on else None


def percent(key: str) -> Callable[[Run], float | None]:
    """The student's share of what the teacher has, in percent."""
    return lambda run: None if (kept := run.kept(key)) is None else 100 * kept


NONE = (lambda _: False), (lambda _: False)
"""Where no target is set."""

TARGETS = (
    Target("WikiText-2 perplexity over the teacher's", ("1.12", "1.04"), most(1.12, 1.04), ratio),
    Target(
        "KL on held-out books at 1,024, nats a token",
        ("0.06", "0.03"),
        most(0.06, 0.03),
        lambda r: r.of("kl books 1024"),
    ),
    Target("LAMBADA kept, %", ("92", "98"), least(92, 98), percent("task lambada_openai"), "{:.0f}"),
    Target(
        "PIQA, ARC-easy, ARC-challenge, WinoGrande: mean over the teacher's, %",
        ("98", "99"),
        least(98, 99),
        four,
        "{:.1f}",
    ),
    Target(
        "recalled tokens of WikiText-2, nats above the teacher",
        ("0.15", "0.05"),
        most(0.15, 0.05),
        recalled("wikitext2"),
    ),
    Target(
        "recalled tokens of books, nats above the teacher",
        ("0.15", "0.05"),
        most(0.15, 0.05),
        recalled("books"),
    ),
    Target(
        "recalled tokens of WikiText-2 whose pair lies 64 tokens back or more",
        ("-", "-"),
        NONE,
        recalled("wikitext2", beyond=True),
    ),
    Target(
        "pass keys at 2,048, % of the teacher's",
        ("50", "95"),
        least(50, 95),
        percent("recall passkey 2048"),
        "{:.0f}",
    ),
    Target(
        "pass keys at 4,096, % of the teacher's",
        ("-", "90"),
        least(0, 90),
        percent("recall passkey 4096"),
        "{:.0f}",
    ),
    Target(
        "books at 16K to 32K over those at 1K to 2K",
        ("no worse", "no worse"),
        most(1.0, 1.0),
        far,
        "{:.3f}",
    ),
    Target(
        "perplexity without the recurrent branch over with it, WikiText-2",
        ("1.5", "1.2"),
        least(1.5, 1.2),
        branch,
    ),
    Target("seconds of training", ("600", "600"), most(600, 600), lambda r: r.seconds, "{:.0f}"),
)


def table(runs: dict[str, Run]) -> str:
    """Markdown: what meets its target is bold, a run whose name has `hybrid` in it is held to the hybrid's."""
    lines = []
    for target in TARGETS:
        cells = [target.says, *target.wanted]
        for name, run in runs.items():
            figure = target.figure(run)
            shown = "" if figure is None else target.show.format(figure)
            met = figure is not None and target.met["hybrid" in name](figure)
            cells.append(f"**{shown}**" if met else shown)
        lines.append(cells)
    return markdown(["", "target, constant", "target, hybrid", *runs], lines)


def main(arguments: list[str] | None = None) -> int:
    """Print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="+", metavar="NAME=FOLDER", help="title of its column, and run folder")
    parser.add_argument("--judged", nargs="*", default=[], type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    runs = {}
    for given in options.run:
        name, _, path = given.partition("=")
        folder = Path(path)
        places = [folder / "eval", *(judged / folder.name for judged in options.judged)]
        scores = [score for place in places for score in Scores(place / "results.json").rows]
        runs[name] = Run(folder, scores)
    print(table(runs))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
