"""Perplexity by position of an untouched Llama teacher that sees a window and its first tokens alone.

    python scripts/results/pinned_far.py smollm2-135m ../shared/data/text/books.long.parquet --tokens 11264
    python scripts/results/pinned_far.py smollm2-135m ../shared/data/text/books.long.parquet --keep 7 14 --reach 8192

Nothing is converted or trained: it says whether first tokens that stay at their own positions, further away than the
teacher has ever seen, are what breaks long texts, and whether layers that keep looking at all of the text are
(docs/results/best-h200.md).
"""

from __future__ import annotations

import argparse
from typing import Any

import pyarrow.parquet
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama

from linearize import models

BLOCK = 512
"""Queries at once, at most."""


def turned_back(q: Tensor, rows: Tensor, inverse: Tensor, cap: int) -> Tensor:
    """`q` of positions `rows`, rotated, as it would be if no position was above `cap`."""
    angle = (rows[:, 0] - rows[:, 0].clamp(max=cap))[:, None] * -inverse
    cos, sin = (torch.cat([x, x], -1) for x in (angle.cos(), angle.sin()))
    half = q.shape[-1] // 2
    return q * cos + torch.cat([-q[..., half:], q[..., :half]], -1) * sin


def attention(window: int, first: int, inverse: Tensor, cap: int, reach: dict[int, int]) -> Any:
    """Softmax over the last `window` tokens and the `first` ones, a block of queries at a time.

    Args:
        window, first, cap: of all layers.
        inverse: frequencies of the rotary embedding.
        reach: layer -> its own window.
    """

    def forward(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        made, own = torch.empty_like(q), reach.get(module.layer_idx, window)
        return _rows(made, q, k, v, own, scaling).transpose(1, 2).contiguous(), None

    def _rows(made: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int, scaling: float) -> Tensor:
        block = min(window, BLOCK)
        for begin in range(0, q.shape[2], block):
            rows = torch.arange(begin, min(begin + block, q.shape[2]))[:, None]
            keys = torch.arange(max(0, begin - window + 1), rows[-1, 0] + 1)
            pinned = torch.arange(first)[torch.arange(first) < keys[0]]
            keys = torch.cat([pinned, keys])
            seen = (keys <= rows) & ((keys > rows - window) | (keys < first))
            asked = q[:, :, rows[:, 0]]
            scores = asked @ k[:, :, keys].mT * scaling
            if len(pinned):
                far = turned_back(asked, rows, inverse, cap) @ k[:, :, pinned].mT * scaling
                scores = torch.cat([far, scores[..., len(pinned) :]], -1)
            made[:, :, rows[:, 0]] = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v[:, :, keys]
        return made

    return forward


def main() -> None:
    """Print a line for each stretch of the text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", help="parquet file with a column text, whose first row is read")
    parser.add_argument("--tokens", type=int, default=11_264)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--first", type=int, default=4)
    parser.add_argument("--cap", type=int, default=2**30, help="no first token is further away than this")
    parser.add_argument("--keep", type=int, nargs="*", default=[], help="layers that look further")
    parser.add_argument(
        "--reach", type=int, default=2**30, help="of these layers; all of the text by default"
    )
    options = parser.parse_args()
    folder = models.resolve(options.model)
    model, _ = models.load_teacher(str(folder), dtype=torch.float32, device="cpu")
    model.set_attn_implementation("eager")
    text = pyarrow.parquet.read_table(options.text)["text"][0].as_py()
    ids = torch.tensor(
        models.load_tokenizer(folder)(text[: 8 * options.tokens])["input_ids"][: options.tokens]
    )
    modeling_llama.eager_attention_forward = attention(
        options.window,
        options.first,
        model.model.rotary_emb.inv_freq,
        options.cap,
        dict.fromkeys(options.keep, options.reach),
    )
    modeling_llama.create_causal_mask = lambda *_, **__: None
    with torch.no_grad():
        hidden = model.model(ids[None]).last_hidden_state[0, :-1]
        nll = torch.cat(
            [
                torch.nn.functional.cross_entropy(model.lm_head(x), wanted, reduction="none")
                for x, wanted in zip(hidden.split(512), ids[1:].split(512), strict=True)
            ]
        )
    begin = 1024
    while begin < len(nll):
        end = min(2 * begin, len(nll))
        print(f"{begin:,} to {end:,}: perplexity {nll[begin:end].mean().exp():.2f}", flush=True)
        begin = end


if __name__ == "__main__":
    main()
