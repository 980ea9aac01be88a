"""Checkpoints for vLLM to serve, and what `generate()` makes of some prompts."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

import tiny
import torch

import linearize
from linearize import surgery

VLLM = importlib.util.find_spec("vllm") is not None
NEW = 24
WIDE = {"head_dim": 32, "hidden_size": 64}
"""vLLM's attention on the CPU takes heads of 32, not those of 8 that `tiny` has."""
LENGTHS = (1, 2, 3, 7, 8, 20, 20, 31, 32, 33, 61, 100, 118, 127, 130, 190)


@dataclass
class Checkpoint:
    """An exported model.

    Attributes:
        path: of the folder.
        prompts: of ids, of all lengths.
        answers: what `generate()` continues each with, greedily.
    """

    path: Path
    prompts: list[list[int]]
    answers: list[list[int]] = field(default_factory=list)


def exported(model, folder: Path, lengths=LENGTHS) -> Checkpoint:
    """A converted model whose mixers are away from their start, saved, with its answers."""
    model = model.float().eval()
    linearize.save(model, folder)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, tiny.VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    found = Checkpoint(folder, prompts)
    for prompt in prompts:
        made = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        found.answers.append(made[0, len(prompt) :].tolist())
    assert sum(len(set(answer)) > 3 for answer in found.answers) > len(prompts) // 2, (
        "answers that say little"
    )
    return found


def lolcats(layers="all", family: str = "llama", **changes):
    """Converted layers of window and features, the others softmax."""
    model = surgery.convert(tiny.model(family, **WIDE, **changes), tiny.LOLCATS, layers)
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    return model
