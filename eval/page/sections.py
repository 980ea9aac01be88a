"""The sections of a page, from the scores of everyone on it; one without anything to show is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from linearize.eval import summary
from linearize.eval.page import controls, recall, training
from linearize.eval.page.blocks import (
    Block,
    Lines,
    Page,
    Point,
    Row,
    Sample,
    Samples,
    Section,
    Series,
    Style,
    Table,
    Words,
)
from linearize.eval.page.contestants import Contestant, contestants
from linearize.eval.page.sources import Subject
from linearize.eval.page.verdict import (
    beyond_teacher,
    listed,
    mean_of,
    recall_of,
    texts,
    verdict,
    written,
)
from linearize.eval.rows import METRICS, STUDENT, TEACHER, Score
from linearize.eval.tables import number

PROMPTS = 6
"""Samples that are shown."""
COSTS = {
    ("prefill", "milliseconds"): ("Prefill", "milliseconds", 1.0),
    ("decode", "tokens_per_second"): ("Decoding", "tokens/s", 1.0),
    ("prefill", "cache_bytes"): ("Cache of one sequence", "MB", 1e-6),
    ("prefill", "peak_bytes"): ("Most memory in prefill", "GB", 1e-9),
    ("decode", "peak_bytes"): ("Most memory in decoding", "GB", 1e-9),
}
"""(task, metric) -> title, unit, factor of what is drawn; the rest says the same in another way."""
WRITTEN = ("decoding", "generation")
"""Tasks of what a model writes."""


def page(subjects: Sequence[Subject]) -> Page:
    """Everything that there is to say about one conversion, or about several."""
    cast = contestants(subjects)
    main = [one for one in cast if one.main]
    headline, findings = verdict(subjects, cast)
    made = [
        Section("Summary", list(_summary(main))),
        Section("Quality against context", list(_quality(main)), _legend(main)),
        Section("Recall by depth and length", list(recall.by_depth(main))),
        Section("Tasks of lm-eval", list(_tasks(main))),
        Section("Cost against context", list(_cost(main)), _legend([one for one in main if _costs(one)])),
        Section("Controls", list(controls.blocks(subjects))),
        training.section(subjects, cast),
        Section("What they write", [*_writing(main), *_samples(main)]),
        Section("How it was measured", list(_provenance(subjects))),
    ]
    title = " against ".join(subject.name for subject in subjects)
    return Page(title, headline, findings, [section for section in made if section.blocks])


def _legend(cast: Sequence[Contestant]) -> list[tuple[str, Style]]:
    return [(one.name, one.style) for one in cast]


def _summary(cast: Sequence[Contestant]) -> Iterator[Block]:
    counted: dict[tuple[str, int], int] = {}
    for one in cast:
        for place in texts(one.rows, one.role):
            counted[place] = counted.get(place, 0) + 1
    lost = beyond_teacher(cast)
    near = [place for place in counted if place not in lost] or list(counted)
    unit = max(near, key=lambda place: (counted[place], place[1])) if near else None
    shared, left = recall_of(cast)
    rows = []
    for one in cast:
        line: Row = {"model": one.name}
        text = [row for row in one.rows if unit is not None and (row.task, row.length or 0) == unit]
        line["perplexity"] = _first(text, "ppl")
        line["95 %"] = _ends(next((row for row in text if row.metric == "ppl" and not row.by), None))
        line["KL to teacher"] = _first(text, "kl")
        line["same token, %"] = _first(text, "agreement")
        far = [row for row in text if row.metric == "ppl_hit" and summary.is_beyond(row)]
        line["recalled ppl"] = far[0].value if far else None
        found = written(one.rows)
        if shared and all(place in found for place in shared):
            mean = 100 * sum(found[place].value for place in shared) / len(shared)
            line["recall written right, %"] = round(mean) if math.isfinite(mean) else mean
        rows.append(line)
    if rows:
        yield Table(_even(rows))
    if unit is not None:
        said = (
            f"Measured on {unit[0]} in windows of {unit[1]:,} tokens; recalled ppl: of tokens whose pair with the "
            "token before repeats one from 64 tokens back or more."
        )
        if shared:
            said += f" Recall: {mean_of(shared, left)}."
        if lost:
            said += f" Longer than the teacher reaches, so that nothing is near it there: {listed(lost)}."
        yield Words(said)


def _quality(cast: Sequence[Contestant]) -> Iterator[Block]:
    units = controls.shown_texts([row for one in cast for row in one.rows])
    students = {one.name for one in cast if one.role == STUDENT}
    for task, length in units:
        where = f"{task}, windows of {length:,}"
        for metric, by, title, x_title, log_y in (
            ("ppl", "position", "Perplexity by position", "token of the window", True),
            ("kl", "position", "KL to the teacher by position", "token of the window", False),
            ("ppl_hit", "distance", "Perplexity of repeated pairs", "tokens back to the last occurrence", True),
        ):  # fmt: skip
            series = _series(cast, partial(_is, task, length, metric, by), _bucket)
            if any(len(one.points) > 1 and one.name in students for one in series):
                unit = "nats a token" if metric == "kl" else "perplexity"
                yield Lines(f"{title} ({where})", x_title, unit, series, log_y=log_y)
    yield from recall.by_length(cast)


def _series(
    cast: Sequence[Contestant], wanted: Callable[[Score], bool], point: Callable[[Score], Point]
) -> list[Series]:
    made = []
    for one in cast:
        points = sorted((point(row) for row in one.rows if wanted(row)), key=lambda point: point.x)
        if points:
            made.append(Series(one.name, one.style, points))
    return made


def _is(task: str, length: int, metric: str, by: str, row: Score) -> bool:
    """Whether a score is one of a bucket."""
    same = (row.task, row.length or 0, row.metric, row.by) == (task, length, metric, by)
    return same and not summary.is_beyond(row)


def _costs_of(task: str, metric: str, batch: str, row: Score) -> bool:
    return (row.task, row.metric, row.bucket) == (task, metric, batch)


def _bucket(row: Score) -> Point:
    """At its upper end, which a bucket that begins at 0 has on a log axis too."""
    return Point(float(row.bucket.split("-")[-1]), row.value, row.low, row.high, row.bucket)


def _tasks(cast: Sequence[Contestant]) -> Iterator[Block]:
    scored = [(one, row) for one in cast for row in one.rows if "lm-eval" in row.version]
    rows = []
    for task, metric, bucket in dict.fromkeys((row.task, row.metric, row.bucket) for _, row in scored):
        said = f"{bucket}, of teacher's" if metric == "relative" else metric
        line: Row = {"task": task, "metric": said, "items": None}
        for one, row in scored:
            if (row.task, row.metric, row.bucket) == (task, metric, bucket):
                line[one.name] = summary.share(row)
                line["items"] = row.n
        rows.append(line)
    if rows:
        yield Table(_even(rows))


def _costs(one: Contestant) -> bool:
    return any(row.task in ("prefill", "decode") for row in one.rows)


def _cost(cast: Sequence[Contestant]) -> Iterator[Block]:
    from linearize.eval.efficiency import crossovers

    kinds = dict.fromkeys(
        (row.task, row.metric, row.bucket)
        for one in cast
        for row in one.rows
        if (row.task, row.metric) in COSTS
    )
    batches = dict.fromkeys(batch for _, _, batch in kinds)
    for task, metric, batch in kinds:
        title, unit, factor = COSTS[task, metric]
        if metric == "cache_bytes" and batch != next(iter(batches)):
            continue  # of one sequence: the same at every batch
        series = _series(cast, partial(_costs_of, task, metric, batch), partial(recall.point, factor=factor))
        several = f", {batch} sequences" if batch != "1" and metric != "cache_bytes" else ""
        yield Lines(f"{title}{several}, {unit}", "tokens of context", unit, series, log_y=True)
    teachers = [row for one in cast if one.role == TEACHER for row in one.rows]
    ahead: dict[tuple[str, str], Row] = {}
    for one in cast:
        if one.role == STUDENT:
            for row in crossovers([*one.rows, *teachers]):
                of = row.task.replace("_", " ")
                line = ahead.setdefault((of, row.bucket), {"of": of, "sequences": row.bucket})
                line[one.name] = int(row.value)
    if ahead:
        yield Table(
            _even(list(ahead.values())), "From which measured context on a student stays ahead of the teacher"
        )


def _writing(cast: Sequence[Contestant]) -> Iterator[Block]:
    """Decoding against prefill, and the plainest faults of what is written."""
    scored = [(one, row) for one in cast for row in one.rows if row.task.split(":")[0] in WRITTEN]
    rows = []
    for task, length, metric in dict.fromkeys((row.task, row.length, row.metric) for _, row in scored):
        line: Row = {"measured": f"{task}, {length:,} tokens", "metric": metric.replace("_", " ")}
        for one, row in scored:
            if (row.task, row.length, row.metric) == (task, length, metric):
                known = METRICS.get(metric)
                share = known is not None and known.share and math.isfinite(row.value)
                line[one.name] = f"{100 * row.value:.2f} %" if share else row.value
        rows.append(line)
    if rows:
        yield Table(_even(rows))


def _samples(cast: Sequence[Contestant]) -> Iterator[Block]:
    prompts = dict.fromkeys(
        prompt for one in cast if one.role == STUDENT for written in one.written for prompt in written.prompts
    )
    made = []
    for prompt in list(prompts)[:PROMPTS]:
        texts = []
        for one in cast:
            for found in one.written:
                if prompt in found.prompts:
                    texts.append((one.name, found.texts[list(found.prompts).index(prompt)]))
                    break
        made.append(Sample(prompt, texts))
    if made:
        yield Samples(made)


def _provenance(subjects: Sequence[Subject]) -> Iterator[Block]:
    rows = [row for subject in subjects for row in subject.rows]
    if not rows:
        return
    commands = dict.fromkeys((subject.name, row.command, row.version, row.seed)
                             for subject in subjects for row in subject.rows)  # fmt: skip
    yield Table(
        [
            {"model": name, "command": command, "by": version, "seed": str(seed)}
            for name, command, version, seed in commands
        ]
    )
    known = dict.fromkeys(row.metric for row in rows if row.metric in METRICS)
    yield Table(
        [
            {"metric": name, "what it is": METRICS[name].about, "better": METRICS[name].better}
            for name in known
        ]
    )
    yield Words(
        "Intervals are at 95 %: whole windows drawn again 2,000 times, Wilson's for shares. A line or bar without "
        "one is a single measurement."
    )


def _first(rows: Sequence[Score], metric: str) -> object:
    found = next((row for row in rows if row.metric == metric and not row.by), None)
    return None if found is None else summary.plain(found)


def _ends(row: Score | None) -> str | None:
    return None if row is None or row.low is None else f"{number(row.low)} to {number(row.high)}"


def _even(rows: Sequence[Row]) -> list[Row]:
    """The same columns in every row, without those that are empty throughout."""
    names = [
        name
        for name in dict.fromkeys(name for row in rows for name in row)
        if any(row.get(name) is not None for row in rows)
    ]
    return [{name: row.get(name) for name in names} for row in rows]
