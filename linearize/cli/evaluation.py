"""`linearize eval PATH`: perplexities, tasks and ablations of a checkpoint, as tables."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

from linearize import plain_json
from linearize.cli.console import console
from linearize.errors import LinearizeError, NotFiniteError


def main(options: argparse.Namespace) -> int:
    """Measure, print what fits a terminal, and write every number as JSON when asked."""
    if options.tasks and options.task_data is None:
        raise LinearizeError(
            "--tasks: the tasks need --task-data DIR, the folder that holds their JSONL files"
        )

    from linearize.cli.checkpoint import export_of, load
    from linearize.eval.tables import results
    from linearize.models import resolve

    if options.tasks:  # before any weight is loaded
        from linearize.eval.harness import check_data, expand

        options.tasks = expand(options.tasks)
        check_data(options.tasks, options.task_data, options.limit)
    if options.json is not None and os.path.isdir(options.json):
        raise LinearizeError(f"--json: {options.json} is a folder; name a file in it")
    if options.teacher:
        resolve(export_of(options.teacher))  # before the minutes that the model takes
    texts = _texts(options.text)
    model, tokenizer = load(options.path, options.device)
    rows = _measure(_name(options.path), model, tokenizer, texts, options)
    if options.teacher:
        teacher, teacher_tokenizer = load(options.teacher, options.device)
        rows.insert(0, _whole("teacher", options.teacher, teacher, teacher_tokenizer, texts, options))
    console().print(results(rows, metrics=["acc"]))
    if options.json is not None:
        _write(options.json, rows, options)
    return 0


def _name(path: str) -> str:
    """What the table calls the model: the run, also when its `checkpoint` folder was given."""
    folder = Path(path)
    return folder.parent.name if folder.name == "checkpoint" and folder.parent.name else folder.name


def _texts(named: list[tuple[str, str]]) -> dict[str, list[Any]]:
    """Name -> documents."""
    from linearize import data
    from linearize.config import DataConfig

    sources = _sources(named)
    if len(sources) < len(named):
        raise LinearizeError("--text: two texts have the same name; give each its own")
    return {
        name: list(data.validation_documents(DataConfig(validation=source)))
        for name, source in sources.items()
    }


def _sources(named: list[tuple[str, str]]) -> dict[str, str]:
    """Name -> what `data.validation` would be; the package's held-out text is called what `run` calls it."""
    from linearize import data

    return dict(named) or {data.HELD_OUT: data.builtin.NAME}


def _measure(
    name: str, model: Any, tokenizer: Any, texts: dict[str, list[Any]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    rows = [_whole(name, options.path, model, tokenizer, texts, options)]
    if options.ablations:
        from linearize import surgery
        from linearize.eval.ablation import ablate

        if not surgery.converted(model):
            raise LinearizeError(
                f"--ablations: {options.path} has no converted layer; it is an ordinary model"
            )

        def measure() -> dict[str, float]:
            return {text: _ablated(model, tokenizer, text, texts[text], options) for text in texts}

        results = ablate(model, measure, teacher=False)
        rows += [{"name": label, "perplexity": values} for label, values in results.items()]
    return rows


def _whole(
    name: str,
    path: str,
    model: Any,
    tokenizer: Any,
    texts: dict[str, list[Any]],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The row of a model as it is: every text and, if asked, every task."""
    found: dict[str, Any] = {"name": name, "perplexity": {}}
    try:
        for text, documents in texts.items():
            found["perplexity"][text] = _perplexity(name, model, tokenizer, text, documents, options)
        if options.tasks:
            from linearize.eval.harness import run_tasks

            found["tasks"] = run_tasks(
                model,
                tokenizer,
                options.tasks,
                data_dir=options.task_data,
                limit=options.limit or None,
                batch_size=options.batch_size,
                autocast=_autocast(model),
            )
    except NotFiniteError as error:
        raise NotFiniteError(f"{path}: {error}") from error
    return found


def _ablated(
    model: Any, tokenizer: Any, text: str, documents: list[Any], options: argparse.Namespace
) -> float:
    """The perplexity of a model that lacks a part, which may be too broken to have one."""
    try:
        return _perplexity("ablation", model, tokenizer, text, documents, options)
    except NotFiniteError:
        return math.nan


def _perplexity(
    name: str, model: Any, tokenizer: Any, text: str, documents: list[Any], options: argparse.Namespace
) -> float:
    from linearize.eval.perplexity import perplexity
    from linearize.progress import Meter

    with Meter(f"{name}: {text}", None) as meter:
        try:
            return perplexity(
                model,
                tokenizer,
                documents,
                window=options.window,
                max_windows=options.max_windows or None,
                batch_size=options.batch_size,
                meter=meter,
                autocast=_autocast(model),
            ).value
        except NotFiniteError as error:
            raise NotFiniteError(f"text '{text}': {error}") from error


def _autocast(model: Any) -> Any:
    """The precision that training used, see RunConfig.precision."""
    import torch

    return torch.bfloat16 if next(model.parameters()).device.type == "cuda" else None


def _write(path: Path, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    document = {
        "rows": rows,
        "window": options.window,
        "max_windows": options.max_windows,
        "limit": options.limit,
        "texts": _sources(options.text),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(plain_json.dumps(document, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:  # a name that no file can have, too
        reason = getattr(error, "strerror", None) or str(error)
        raise LinearizeError(
            f"--json: cannot write {path}: {reason}; the numbers stand above. Name another file, or mend the cause, "
            "and measure again"
        ) from error
