"""The checkpoint folder at the end of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from linearize import export
from linearize.config.schema import Recipe
from linearize.distill.folder import ADAPTER, RunFolder
from linearize.export import rounding
from linearize.export.adapter import save_adapter


def checkpoint(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    folder: RunFolder,
    *,
    rows: list[dict[str, Any]],
    dtype: torch.dtype,
    base: str,
) -> Path:
    """Write a trained model: adapters merged, or beside it in `adapter` when a stage says `merge: false`.

    Args:
        model: converted, with or without adapters.
        tokenizer: of the teacher.
        recipe: of the run.
        folder: of the run.
        rows: of results.json.
        dtype: of the weights that are written.
        base: the teacher, as the run was given it.

    Returns:
        The folder of the checkpoint.
    """
    apart = None
    if hasattr(model, "merge_and_unload"):
        lora = [stage.lora for stage in recipe.stages.values() if stage.lora is not None]
        if all(adapters.merge for adapters in lora):
            model = rounding.merged(model, dtype)
        else:
            apart = folder.path / ADAPTER
            save_adapter(model, apart, base=folder.checkpoint)
            model = model.unload()
    path = export.save(
        rounding.in_dtype(model, dtype),
        folder.checkpoint,
        tokenizer=tokenizer,
        recipe=dataclasses.asdict(recipe),
        metrics={"rows": rows},
        base=base,
        check=True,
    )
    if apart is not None:
        apart.rename(path / "adapter")
    return path
