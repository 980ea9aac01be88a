"""The report of a run folder: what was run, on what, what came out, and two or three pictures.

Reads only files of the folder (recipe.yaml, plan.json, metrics.jsonl, results.json, environment.json), each of which
may be missing or cut short: a run that was stopped still gets a report of what it has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from matplotlib import rc_context

from linearize import markdown, plain_json
from linearize.config.words import ranges
from linearize.errors import RunFolderError
from linearize.eval import plots, tables
from linearize.progress import count, duration

WORST_LAYERS = 5
LOUD = ("command", "model", "recipe", "device", "precision", "seed")
"""Entries of environment.json that are shown in the first table; the rest goes under "Environment"."""


@dataclass
class Run:
    """What was found in a run folder."""

    recipe: dict[str, Any] = field(default_factory=dict)
    plan: Any = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        """Which of the model's layers the entries of a line's "layers" are: the converted ones, by the plan."""
        entries = max((len(line["layers"]) for line in self.metrics if line.get("layers")), default=0)
        planned = [row["layer"] for row in _converted(self.plan) if isinstance(row.get("layer"), int)]
        return planned if len(planned) == entries else list(range(entries))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of results.json."""
        rows = self.results.get("rows")
        return [tables.restored(row) for row in rows if _is_row(row)] if isinstance(rows, list) else []


def read_run(out: str | Path) -> Run:
    """Read what a run folder holds; unreadable or missing files count as empty.

    Raises:
        RunFolderError: there is no such folder, or none of a run's files is in it.
    """
    folder = Path(out)
    if not folder.is_dir():
        raise RunFolderError(f"no run folder at '{folder}'")
    names = ("recipe.yaml", "plan.json", "metrics.jsonl", "results.json", "environment.json")
    if not any((folder / name).is_file() for name in names):
        raise RunFolderError(f"'{folder}' is no run folder: it has none of {', '.join(names)}")
    return Run(
        recipe=_mapping(_parse(folder / "recipe.yaml")),
        plan=_parse(folder / "plan.json"),
        metrics=_lines(folder / "metrics.jsonl"),
        results=_mapping(_parse(folder / "results.json")),
        environment=_mapping(_parse(folder / "environment.json")),
    )


def write_report(out: str | Path) -> Path:
    """Write report.md and its plots into a run folder; call it as often as you like, also while the run goes on.

    Args:
        out: the run folder.

    Returns:
        Path of report.md. Plots beside it, where there is something to plot: layer_loss.png, loss.png, schedule.png,
        perplexity.png.

    Raises:
        RunFolderError: no such folder, or no run in it.
    """
    folder = Path(out)
    run = read_run(folder)
    with rc_context({"text.parse_math": False}):  # names of stages and texts are words
        pictures = {
            "Perplexity of each state of the model": plots.perplexity_bars(
                run.rows, folder / "perplexity.png"
            ),
            "Loss of each stage": plots.loss_curves(run.metrics, folder / "loss.png"),
            "What changed within the stages": plots.schedules(run.metrics, folder / "schedule.png"),
            "Transfer loss of each layer": plots.layer_loss(
                run.metrics, folder / "layer_loss.png", run.layers
            ),
        }
    path = folder / "report.md"
    path.write_text(
        render(run, {title: file.name for title, file in pictures.items() if file}), encoding="utf-8"
    )
    return path


def render(run: Run, pictures: Mapping[str, str] | None = None) -> str:
    """The report as markdown.

    Args:
        run: what `read_run` found.
        pictures: title -> file name, relative to the report.
    """
    shown = dict(pictures or {})
    parts = [
        f"# {_headline(run)}",
        _summary(run),
        _section("Results", _results(run), shown, ["Perplexity of each state of the model"]),
        _section("Training", _stages(run), shown, ["Loss of each stage", "What changed within the stages"]),
        _section("Layers", _layers(run), shown, ["Transfer loss of each layer"]),
        _section("Recipe", _recipe(run)),
        _section("Environment", _environment(run)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _headline(run: Run) -> str:
    model = run.environment.get("model") or run.results.get("model") or "model"
    recipe = run.environment.get("recipe") or run.recipe.get("name") or ""
    by = f" by {markdown.text(recipe)}" if isinstance(recipe, str) and recipe else ""
    return f"{markdown.text(model)}, linearized{by}"


def _summary(run: Run) -> str:
    lines = []
    if run.recipe.get("description"):
        lines.append(f"{markdown.text(run.recipe['description'])}.".replace("..", "."))
    if run.recipe.get("paper"):
        lines.append(f"Method: {markdown.text(run.recipe['paper'])}.".replace("..", "."))
    if not run.rows:
        lines.append("**Not finished:** this run has no results yet.")
    known = [(key, run.environment.get(key)) for key in LOUD]
    facts = [(key, _plain(value)) for key, value in known if value not in (None, "")] + _plan_facts(run.plan)
    return "\n\n".join(part for part in [" ".join(lines), _facts(facts)] if part)


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    return tables.markdown([{"": name, "value": value} for name, value in facts])


def _plan_facts(plan: Any) -> list[tuple[str, str]]:
    """Layers, parameters and bytes of plan.json, as far as they are there."""
    rows, converted = _plan_rows(plan), _converted(plan)
    if not rows:
        return []
    facts = [("layers converted", f"{len(converted)} of {len(rows)}")]
    facts += _mixers(plan, converted)
    params = sum(int(row.get("parameters") or 0) for row in rows)
    if params:
        facts.append(("parameters added", tables.number(params)))
    state = sum(int(row.get("state_bytes") or 0) for row in rows)
    if state:
        size = f"{state / 1e6:.2f} MB" if state >= 1e6 else f"{state:,} bytes"
        facts.append(("state of one sequence", f"{size}, at any length (16-bit model)"))
    per_token = sum(int(row.get("kv_bytes_per_token") or 0) for row in converted)
    if state and per_token:
        length = plan.get("break_even", -(-state // per_token))
        rest = "never larger, as its windows cap it" if length is None else f"equal at {length:,} tokens"
        equal = f"{per_token:,} bytes a token; {rest}"
        facts.append(("KV cache that it replaces", equal))
    return facts


def _mixers(plan: Mapping[str, Any], converted: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Which layers have which mixer, where there are several."""
    words = plan.get("mixers")
    names = list(dict.fromkeys(row.get("mixer") for row in converted))
    if not isinstance(words, Mapping) or len(names) < 2:
        return []
    layers = {
        name: [
            row["layer"]
            for row in converted
            if row.get("mixer") == name and isinstance(row.get("layer"), int)
        ]
        for name in names
    }
    return [(f"layers {ranges(layers[name])}", _plain(f"{name}: {words.get(name, '')}")) for name in names]


def _plan_rows(plan: Any) -> list[Mapping[str, Any]]:
    rows = plan.get("rows") if isinstance(plan, Mapping) else None
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []


def _converted(plan: Any) -> list[Mapping[str, Any]]:
    return [row for row in _plan_rows(plan) if row.get("kind") == "mixer"]


def _results(run: Run) -> str:
    found = tables.sections(run.rows)
    parts = []
    if "Perplexity" in found:
        parts.append(tables.markdown(found["Perplexity"]))
        evaluation = _mapping(run.recipe.get("eval"))
        if evaluation.get("length"):
            length = f"non-overlapping windows of {evaluation['length']:,} tokens"
            windows = f"at most {evaluation['max_windows']}" if evaluation.get("max_windows") else "all"
            parts.append(f"Perplexity (ppl): {length}, {windows} of each text.")
    if "Tasks" in found:
        parts.append(tables.markdown(found["Tasks"]))
        tasks = [item for row in run.rows for item in (row.get("tasks") or {}).items()]
        items = {task: values["items"] for task, values in tasks if values.get("items")}
        known = ", ".join(f"{task} {int(value):,}" for task, value in items.items())
        rule = "Zero-shot; acc takes the choice of largest summed log-probability, acc_norm divides that by bytes."
        parts.append(f"Items: {known}. {rule}" if known else rule)
    return "\n\n".join(parts)


def _stages(run: Run) -> str:
    stages: dict[str, list[dict[str, Any]]] = {}
    for line in run.metrics:
        stages.setdefault(str(line.get("stage", "")), []).append(line)
    rows = []
    for stage, lines in stages.items():
        last = lines[-1]
        losses = [line["loss"] for line in lines if isinstance(line.get("loss"), int | float)]
        speeds = sorted(line["tokens_per_second"] for line in lines if line.get("tokens_per_second"))
        speed = speeds[len(speeds) // 2] if speeds else None
        trained = last.get("tokens") or 0
        rows.append({
            "stage": stage,
            "steps": last.get("step"),
            "tokens": count(trained),
            "first loss": losses[0] if losses else None,
            "last loss": losses[-1] if losses else None,
            "tokens/s (median)": round(speed) if speed else None,
            "about": duration(trained / speed) if speed else None,
        })  # fmt: skip
    changed = [f"{stage}: {words}" for stage, lines in stages.items() if (words := _changed(lines))]
    notes = [f"Within a stage, one after the other: {'. '.join(changed)}."] if changed else []
    return "\n\n".join([tables.markdown(rows), *notes])


def _changed(lines: Sequence[Mapping[str, Any]]) -> str:
    """What changed within a stage, each with its values in order."""
    found: dict[str, list[str]] = {}
    for line in lines:
        for name in set(plots.SCHEDULED) - set(plots.RATES) & line.keys():
            value = f"{line[name]:g}" if isinstance(line.get(name), int | float) else ""
            if value and found.setdefault(name, [""])[-1] != value:
                found[name].append(value)
    return "; ".join(f"{name} {', '.join(found[name][1:])}" for name in plots.SCHEDULED if name in found)


def _layers(run: Run) -> str:
    lines = [line for line in run.metrics if line.get("layers")]
    if not lines:
        return ""
    first, last = lines[0]["layers"], lines[-1]["layers"]
    worst = sorted(zip(last, first, run.layers, strict=False), key=lambda entry: -entry[0])[:WORST_LAYERS]
    rows = [
        {
            "layer": number,
            "first loss": before,
            "last loss": after,
            "last / first": after / before if before else None,
        }
        for after, before, number in worst
    ]
    headline = f"The {len(rows)} layers with the largest loss at the end of transfer, of {len(last)}:"
    return f"{headline}\n\n{tables.markdown(rows)}"


def _recipe(run: Run) -> str:
    if not run.recipe:
        return ""
    text = yaml.safe_dump(run.recipe, sort_keys=False, default_flow_style=None, width=110).strip()
    return markdown.fenced(text, "yaml")


def _environment(run: Run) -> str:
    rest = {key: value for key, value in run.environment.items() if key not in LOUD}
    facts: list[tuple[str, str]] = []
    for key, value in rest.items():
        if isinstance(value, Mapping) and key != "fingerprint":
            facts += [(str(name), _plain(item)) for name, item in value.items()]
        else:
            facts.append((key, _plain(value)))
    return _facts(facts)


def _section(
    title: str, body: str, pictures: Mapping[str, str] | None = None, names: Sequence[str] = ()
) -> str:
    images = [f"![{name}]({pictures[name]})" for name in names if pictures and name in pictures]
    parts = [part for part in [body, *images] if part]
    return "\n\n".join([f"## {title}", *parts]) if parts else ""


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    # processes that went on with the run
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        return f"{len(value)} times, last {value[-1].get('started', '')}".rstrip()
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return str(value)


def _is_row(row: Any) -> bool:
    return isinstance(row, Mapping) and all(
        isinstance(row.get(part) or {}, Mapping) for part in ("perplexity", "tasks")
    )


def _is_line(line: Any) -> bool:
    """Whether a line of metrics.jsonl is one: a stage, and numbers where numbers belong."""
    if not isinstance(line, Mapping) or not isinstance(line.get("stage", ""), str):
        return False
    numbers = [line[name] for name in ("step", "tokens", "tokens_per_second", "loss") if name in line]
    layers = line.get("layers") or []
    return isinstance(layers, list) and all(plain_json.is_number(number) for number in [*numbers, *layers])


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _parse(path: Path) -> Any:
    try:
        # YAML holds JSON, but json reads NaN and Infinity, which a diverged run may have written.
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; the last one may have been cut when the run was killed."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            item = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _is_line(item):
            found.append(item)
    return found
