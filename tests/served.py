"""Checkpoints for vLLM to serve, what `generate()` makes of some prompts, and what vLLM does."""

from __future__ import annotations

import importlib.util
import random
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
    assert len({token for answer in found.answers for token in answer}) > 8, "answers that say little"
    return found


def lolcats(layers="all", family: str = "llama", **changes):
    """Converted layers of window and features, the others softmax."""
    model = surgery.convert(tiny.model(family, **{**WIDE, **changes}), tiny.LOLCATS, layers)
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    return model


def greedy(tokens: int = NEW):
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def answers(llm, prompts: list[list[int]], tokens: int = NEW) -> list[list[int]]:
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [list(made.outputs[0].token_ids) for made in llm.generate(asked, greedy(tokens), use_tqdm=False)]


def count(llm, name: str) -> float:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def churn(llm, checkpoint: Checkpoint, texts: int, seed: int) -> tuple[int, int]:
    """Random arrivals, lengths and aborts; every answer that ends is checked. How many ended, and how many not."""
    engine, dice = llm.llm_engine, random.Random(seed)
    asked: dict[str, tuple[int, int]] = {}
    made = ended = aborted = 0
    while made < texts or asked:
        while made < texts and dice.random() < 0.5:
            which, tokens = dice.randrange(len(checkpoint.prompts)), dice.choice([1, 2, NEW, NEW])
            name = f"{seed}-{made}"
            engine.add_request(name, {"prompt_token_ids": checkpoint.prompts[which]}, greedy(tokens))
            asked[name], made = (which, tokens), made + 1
        if asked and dice.random() < 0.15:
            name = dice.choice(list(asked))
            engine.abort_request([name])
            del asked[name]
            aborted += 1
        for output in engine.step():
            if output.finished and output.request_id in asked:
                which, tokens = asked.pop(output.request_id)
                assert list(output.outputs[0].token_ids) == checkpoint.answers[which][:tokens], (
                    output.request_id
                )
                ended += 1
    return ended, aborted
