"""Which layers of an untouched teacher have to see far: a window and the first tokens in all others, by masks alone.

    python scripts/results/layers_far.py smollm2-135m --window 512 --length 2048 --greedy 6 \\
        --sets 7,14,15,18,21,23 4,9,14,19,24,29 --text ../shared/data/text/wikitext2.test.parquet

Nothing is converted or trained. For sets of layers, and one by one for those that lower it most, it prints what pass
keys cost (KL to the teacher, nats a key), how likely the answer's first token is, and how many keys would be written;
and the perplexity of a text over the teacher's by position, for windows of several sizes (docs/results/best-h200.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pyarrow.parquet
import torch
from passkey_tokens import prompts
from torch import Tensor

from linearize import models

FAR = 2**30
"""A window that ends before no text."""


class Masked:
    """A Llama teacher whose layers each have a window.

    Args:
        model: of transformers, in eval mode.
        first: tokens that every layer sees.
    """

    def __init__(self, model: Any, first: int) -> None:
        self.model, self.first = model, first
        self.inner = model.model
        self.layers = range(len(self.inner.layers))
        self.device, self.dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        self._mask = cache(self._made)

    def _made(self, window: int, length: int) -> Tensor:
        place = torch.arange(length, device=self.device)
        age = place[:, None] - place
        seen = (age >= 0) & ((age < window) | (place < self.first))
        mask = torch.zeros(length, length, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(~seen, float("-inf"))[None, None]

    def start(self, ids: Tensor) -> Tensor:
        """Hidden states [B, T, D] in front of the first layer."""
        embedded: Tensor = self.inner.embed_tokens(ids)
        return embedded

    def through(
        self, x: Tensor, windows: Sequence[int], begin: int = 0, kept: list[Tensor] | None = None
    ) -> Tensor:
        """Behind the last layer.

        Args:
            x: hidden states [B, T, D] in front of layer `begin`.
            windows: of each layer.
            begin: first layer.
            kept: gets what stands in front of each layer.
        """
        places = torch.arange(x.shape[1], device=x.device)[None]
        rotary = self.inner.rotary_emb(x, places)
        for layer in self.layers[begin:]:
            if kept is not None:
                kept.append(x)
            mask = self._mask(min(windows[layer], x.shape[1]), x.shape[1])
            made = self.inner.layers[layer](
                x, attention_mask=mask, position_embeddings=rotary, position_ids=places
            )
            x = made[0] if isinstance(made, tuple) else made
        return x

    def said(self, x: Tensor) -> Tensor:
        """Log probabilities of the next token."""
        scores: Tensor = self.model.lm_head(self.inner.norm(x)).float().log_softmax(-1)
        return scores


class PassKeys:
    """Pass keys of one length, what the teacher says of them, and what a placement does.

    Args:
        masked, tokenizer: of the teacher.
        length: of the prompts.
        count: of the keys; the first `skip` are left out.
    """

    def __init__(self, masked: Masked, tokenizer: Any, length: int, count: int, skip: int = 0) -> None:
        made = prompts(tokenizer, skip + count, length)[skip:]
        usual = max(len(one.answers[0]) for one in made)
        made = [one for one in made if len(one.answers[0]) == usual]
        self.masked = masked
        self.ids = torch.tensor([one.ids + one.answers[0] for one in made], device=masked.device)
        self.answers = self.ids[:, -usual:]
        self.teacher = self._said(masked.through(masked.start(self.ids), [FAR] * len(masked.layers)))

    def _said(self, x: Tensor) -> Tensor:
        return self.masked.said(x[:, -self.answers.shape[1] - 1 : -1])

    def __call__(
        self, far: Sequence[int], window: int, begin: int = 0, x: Tensor | None = None
    ) -> dict[str, float]:
        """KL, likelihood of the first token and share that is written, with `far` layers that see everything."""
        windows = [FAR if layer in far else window for layer in self.masked.layers]
        x = self.masked.start(self.ids) if x is None else x
        return self.figures(self._said(self.masked.through(x, windows, begin)))

    def figures(self, said: Tensor) -> dict[str, float]:
        """Of log probabilities [B, k, vocabulary] at the answers."""
        cost = (self.teacher.exp() * (self.teacher - said)).sum(-1)
        first = said[:, 0].gather(1, self.answers[:, :1]).exp()
        written = (said.argmax(-1) == self.answers).all(-1)
        return {
            "nats a key": cost.sum(-1).mean().item(),
            "of them at its first token": cost[:, 0].mean().item(),
            "likelihood of that": first.mean().item(),
            "written, %": 100 * written.float().mean().item(),
        }

    def greedy(self, many: int, window: int) -> list[int]:
        """Layers whose far sight lowers the cost most, one after the other."""
        far: list[int] = []
        for _ in range(many):
            before: list[Tensor] = []
            windows = [FAR if layer in far else window for layer in self.masked.layers]
            self.masked.through(self.masked.start(self.ids), windows, kept=before)
            cost = {
                layer: self([*far, layer], window, layer, before[layer])["nats a key"]
                for layer in self.masked.layers
                if layer not in far
            }
            far.append(min(cost, key=cost.__getitem__))
            print(f"greedy: {far[-1]} -> {cost[far[-1]]:.3f} nats a key", flush=True)
        return sorted(far)


def by_position(masked: Masked, ids: Tensor, far: Sequence[int], window: int, edges: Sequence[int]) -> str:
    """Perplexity over the teacher's, in all and between `edges`.

    Args:
        masked: of the teacher.
        ids: [N, T], windows of a text.
        far, window: as elsewhere.
        edges: positions.
    """
    windows = [FAR if layer in far else window for layer in masked.layers]
    worse = []
    for row in ids:
        losses = []
        for sight in (windows, [FAR] * len(windows)):
            said = masked.said(masked.through(masked.start(row[None]), sight))[0, :-1]
            losses.append(-said.gather(1, row[1:, None])[:, 0])
        worse.append(losses[0] - losses[1])
    difference = torch.stack(worse)
    parts = [
        f"{begin} to {end}: {difference[:, begin:end].mean().exp():.3f}" for begin, end in pairwise(edges)
    ]
    return f"{difference.mean().exp():.4f} ({', '.join(parts)})"


def numbers(text: str) -> list[int]:
    """`7,14` as numbers."""
    return [int(part) for part in text.split(",") if part]


def shown(found: dict[str, float]) -> str:
    """A line's figures."""
    return ", ".join(f"{name} {value:.3g}" for name, value in found.items())


def main() -> None:
    """Print a line for each set, and each step of the search."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--window", type=int, default=256, help="of all other layers")
    parser.add_argument("--first", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048, help="of the pass keys that choose")
    parser.add_argument(
        "--also", type=int, nargs="*", default=[], help="lengths at which sets are looked at, too"
    )
    parser.add_argument("--items", type=int, default=8, help="pass keys that choose; as many others judge")
    parser.add_argument("--greedy", type=int, default=0, help="layers to choose")
    parser.add_argument("--sets", type=numbers, nargs="*", default=[], metavar="7,14")
    parser.add_argument("--text", help="parquet file with a column text, for perplexity by position")
    parser.add_argument("--texts", type=int, default=16, help="windows of it, 1,024 tokens each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    folder = models.resolve(options.model)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model, _ = models.load_teacher(str(folder), dtype=dtype, device=options.device)
    model.set_attn_implementation("sdpa")
    masked, tokenizer = Masked(model.eval(), options.first), models.load_tokenizer(folder)
    with torch.no_grad():
        chosen = []
        if options.greedy:
            choosing = PassKeys(masked, tokenizer, options.length, options.items)
            chosen = [choosing.greedy(options.greedy, options.window)]
        for length in (options.length, *options.also):
            judging = PassKeys(masked, tokenizer, length, options.items, options.items)
            print(f"{length:,} tokens, teacher: {shown(judging.figures(judging.teacher))}")
            for far in [*chosen, *options.sets]:
                print(f"{length:,} tokens, {far}: {shown(judging(far, options.window))}", flush=True)
        if options.text:
            text = pyarrow.parquet.read_table(options.text)["text"][0].as_py()
            ids = tokenizer(text[: 8 * 1024 * options.texts])["input_ids"][: 1024 * options.texts]
            rows = torch.tensor(ids, device=options.device).view(-1, 1024)
            for far in [*chosen, *options.sets]:
                for window in (256, 512, 1024):
                    found = by_position(masked, rows, far, window, (0, 256, 512, 1023))
                    print(f"text, {far} far, others {window}: {found}", flush=True)


if __name__ == "__main__":
    main()
