"""The checkpoint of a model that fits nowhere: the teacher's own tensors, one after the other, and the mixers."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig

from linearize import export, models, storing
from linearize.distill.blockwise.job import Job
from linearize.distill.lock import held
from linearize.distill.pieces import Pieces
from linearize.distill.results import Results
from linearize.distill.stages import DONE, FINAL
from linearize.errors import LinearizeError
from linearize.export import rounding, streamed
from linearize.export.reloading import fingerprint
from linearize.export.save import Weights
from linearize.surgery.model import linearized

CPU = torch.device("cpu")


def checkpoint(job: Job) -> Path:
    """Write the converted model of a run that has no other stages; memory holds one file of weights.

    A fresh process then loads the folder where memory allows, and holds every tensor against what was written.

    Args:
        job: whose blocks are joined.

    Raises:
        LinearizeError: other stages are still to be trained, or the blocks are not joined.
        CheckpointError: the disk is full or refuses.
    """
    job.open()
    rest = list(job.recipe.stages)[len(job.stages) :]
    if rest:
        raise LinearizeError(
            f"--export: stage '{rest[0]}' is still to be trained: go on with {job.command('run')} --resume (or, where "
            f"transfer is all there shall be, take it out of the recipe: ~stages.{rest[0]})"
        )
    with held(job.folder.path), storing.writing(job.folder.path):
        return _write(job)


def _write(job: Job) -> Path:
    last = job.stages[-1]
    folder = job.folder.path / last.folder
    if not (folder / DONE).is_file():
        raise LinearizeError(f"{folder}: its blocks are not joined: {job.command('blocks join')}")
    mixers = Pieces(folder / FINAL)
    given = job.recipe.export.dtype
    dtype = models.stored_dtype(job.source) if given == "auto" else getattr(torch, given)
    twin = _twin(job, dtype)
    state: dict[str, Tensor] = twin.state_dict(keep_vars=True)
    from transformers.core_model_loading import revert_weight_conversion

    own = {name: tensor for name, tensor in state.items() if name not in mixers.shapes}
    stored = job.parts.stored
    like = {name: x for name, x in revert_weight_conversion(twin, own).items() if name in stored}
    like |= {name: tensor for name, tensor in state.items() if name in mixers.shapes}

    def tensor(name: str) -> Tensor:
        if name in mixers.shapes:
            return mixers.whole(name)
        # as a whole run, which loads in its own precision and rounds at the end
        return job.parts.read(stored[name]).to(job.weights).to(like[name].dtype)

    partial = job.folder.path / f"{storing.PARTIAL}weights"
    storing.make_anew(partial)
    try:
        written = streamed.write(partial, tensor, like, writes=True)
    except (OSError, SafetensorError) as error:
        raise storing.could_not_write(partial, error) from error
    expected = {name: written[name] for name in mixers.shapes} | _expected(job, own)
    rows = Results(job.folder.results).rows
    path = export.save(
        twin,
        job.folder.checkpoint,
        tokenizer=job.tokenizer,
        recipe=dataclasses.asdict(job.recipe),
        metrics={"rows": rows},
        base=job.source,
        weights=Weights(partial, expected),
        check=True,
    )
    storing.remove(partial)
    return path


def _twin(job: Job, dtype: torch.dtype) -> Any:
    """The converted model without weights."""
    twin: Any = job.parts.empty()
    with torch.device("meta"):
        linearized(twin, copy.deepcopy(job.maker.plan))
    for name, parameter in twin.named_parameters():
        if name in set(job.maker.names):
            parameter.data = parameter.data.float()
    if (job.parts.folder / "generation_config.json").is_file():
        twin.generation_config = GenerationConfig.from_pretrained(job.parts.folder)
    if twin.generation_config.pad_token_id is None:
        twin.generation_config.pad_token_id = job.tokenizer.pad_token_id
    twin.tie_weights()
    return rounding.in_dtype(twin, dtype).eval()


def _expected(job: Job, own: dict[str, Tensor]) -> dict[str, list[Any]]:
    """Fingerprints of the base model's tensors as a reader will have them, loaded a block at a time."""
    found: dict[str, list[Any]] = {}
    for layers, ends in [*((block, False) for block in job.blocks), (range(0), True)]:
        model = job.parts.load(layers, table=ends, head=ends, device=CPU)
        for name, tensor in model.state_dict().items():
            if not tensor.is_meta and name in own and name not in found:
                found[name] = fingerprint(tensor.to(own[name].dtype))
    return found
