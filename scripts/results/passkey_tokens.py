"""Which token of a pass key a model does not write: the loss of each, and what is likeliest in the first one's place.

    python scripts/results/passkey_tokens.py runs/best_hybrid --length 2048
    python scripts/results/passkey_tokens.py smollm2-135m --recipe best_hybrid 'layers={keep: [7, 14, 15, 18, 21, 23]}'

With `--recipe` the model is converted and neither calibrated nor trained, and its windows work alone.
"""

from __future__ import annotations

import argparse
from collections import Counter
from contextlib import nullcontext
from random import Random
from typing import Any

import torch

from linearize import models, surgery
from linearize.cli.checkpoint import load
from linearize.config import compose
from linearize.distill.device import resolve_precision
from linearize.eval.recall.haystack import Haystack, Prompt
from linearize.eval.recall.passkey import passkey


def prompts(tokenizer: Any, count: int, length: int) -> list[Prompt]:
    """Pass keys at even depths, each of `length` tokens."""
    haystack, found = Haystack(tokenizer), []
    for number in range(count):
        drawn = Random(f"tokens {length} {number}")
        found.append(haystack.assemble(passkey(drawn, (number + 0.5) / count), length, drawn))
    return found


def rounded(values: torch.Tensor, digits: int) -> list[float]:
    """For printing."""
    return [round(value, digits) for value in values.tolist()]


def main() -> None:
    """Print a line for each key, and their mean."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="run folder, checkpoint or MODEL")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--recipe", help="convert the model by it, untrained")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--items", type=int, default=11)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    options = parser.parse_intermixed_args()
    if options.recipe:
        model, _ = models.load_teacher(options.model, dtype=torch.float32, device="cpu", for_text=True)
        recipe = compose(options.recipe, options.overrides)
        model = surgery.convert(model, recipe.mixer, recipe.layers, recipe.mixers)
        tokenizer = models.load_tokenizer(models.resolve(options.model))
    else:
        model, tokenizer = load(options.model, options.device)
    model.eval()
    device = next(model.parameters()).device
    run = compose("lolcats", [f"run.device={device.type}"]).run
    autocast = resolve_precision(run, device)
    alone = surgery.branch_off(model, "linear") if options.recipe else nullcontext()
    losses, instead, written = [], Counter[str](), 0
    with torch.no_grad(), alone, torch.autocast(device.type, autocast, enabled=autocast is not None):
        for prompt in prompts(tokenizer, options.items, options.length):
            answer = torch.tensor(prompt.answers[0], device=device)
            ids = torch.tensor([prompt.ids], device=device)
            logits = model(
                torch.cat([ids, answer[None]], 1), use_cache=False, logits_to_keep=len(answer) + 1
            ).logits
            said = logits[0, :-1].float().log_softmax(-1)
            losses.append(-said.gather(1, answer[:, None])[:, 0].cpu())
            right = (said.argmax(-1) == answer).cpu()
            written += bool(right.all())
            top = said[0].exp().topk(3)
            likeliest = [
                f"{tokenizer.decode([token])!r} {share:.2f}"
                for share, token in zip(top.values.tolist(), top.indices.tolist(), strict=True)
            ]
            wrong = [place for place, well in enumerate(right.tolist()) if not well]
            instead.update(f"token {place}" for place in wrong[:1])
            print(
                f"depth {prompt.item.depth:.2f}  nats {rounded(losses[-1], 2)}  wrong {wrong}  "
                f"first: {', '.join(likeliest)}",
                flush=True,
            )
    mean = torch.stack(losses).mean(0)
    first = ", ".join(f"{name} in {count}" for name, count in instead.most_common()) or "none"
    print(
        f"{written} of {options.items} written at {options.length}; nats of each token {rounded(mean, 3)}; "
        f"the first wrong one: {first}"
    )


if __name__ == "__main__":
    main()
