"""`linearize eval PATH`: perplexities, tasks and ablations of a checkpoint, as tables."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from linearize.cli.console import console
from linearize.errors import LinearizeError


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
    if options.teacher:
        resolve(export_of(options.teacher))  # before the minutes that the model takes
    texts = _texts(options.text)
    model, tokenizer = load(options.path, options.device)
    rows = _measure(_name(options.path), model, tokenizer, texts, options)
    if options.teacher:
        teacher, teacher_tokenizer = load(options.teacher, options.device)
        teacher_row = _row("teacher", teacher, teacher_tokenizer, texts, options, tasks=True)
        rows.insert(0, teacher_row)
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

    sources = dict(named) or {"builtin": "builtin"}
    if len(sources) < len(named):
        raise LinearizeError("--text: two texts have the same name; give each its own")
    return {
        name: list(data.validation_documents(DataConfig(validation=source)))
        for name, source in sources.items()
    }


def _measure(
    name: str, model: Any, tokenizer: Any, texts: dict[str, list[Any]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    rows = [_row(name, model, tokenizer, texts, options, tasks=True)]
    if options.ablations:
        from linearize import surgery
        from linearize.eval.ablation import ablate

        if not surgery.converted(model):
            raise LinearizeError(
                f"--ablations: {options.path} has no converted layer; it is an ordinary model"
            )
        results = ablate(
            model, lambda: _row("", model, tokenizer, texts, options, tasks=False), teacher=False
        )
        rows += [{**row, "name": label} for label, row in results.items()]
    return rows


def _row(
    name: str,
    model: Any,
    tokenizer: Any,
    texts: dict[str, list[Any]],
    options: argparse.Namespace,
    *,
    tasks: bool,
) -> dict[str, Any]:
    import torch

    from linearize.eval.perplexity import perplexity
    from linearize.progress import Meter

    # The precision that training used, see RunConfig.precision.
    autocast = torch.bfloat16 if next(model.parameters()).device.type == "cuda" else None
    found: dict[str, Any] = {"name": name, "perplexity": {}}
    for text, documents in texts.items():
        with Meter(f"{name or 'ablation'}: {text}", None) as meter:
            result = perplexity(
                model,
                tokenizer,
                documents,
                window=options.window,
                max_windows=options.max_windows or None,
                batch_size=options.batch_size,
                meter=meter,
                autocast=autocast,
            )
        found["perplexity"][text] = result.value
    if tasks and options.tasks:
        from linearize.eval.harness import run_tasks

        found["tasks"] = run_tasks(
            model,
            tokenizer,
            options.tasks,
            data_dir=options.task_data,
            limit=options.limit or None,
            batch_size=options.batch_size,
            autocast=autocast,
        )
    return found


def _write(path: Path, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    document = {
        "rows": rows,
        "window": options.window,
        "max_windows": options.max_windows,
        "limit": options.limit,
        "texts": dict(options.text) or {"builtin": "builtin"},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    except (PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        raise LinearizeError(f"--json: cannot write {path}: {error.strerror}") from error
