"""Operations that a prompt takes, a layer: what bounds short prompts on a GPU, where each is a launch or more.

    PYTHONPATH=. python scripts/kernels/count_prefill.py teacher lolcats gated_delta_window

Of a small model's prompt into an empty cache, Triton's kernels interpreted and one operation each; the difference of
four layers and two, halved. Views launch nothing, but the host makes them, too.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from linearize.bench.subjects import TEACHER, convert, random_model
from linearize.decode.arguments import cache_name
from linearize.kernels import dispatch

TOKENS = 48
VIEWS = (
    "view",
    "expand",
    "transpose",
    "slice",
    "select",
    "squeeze",
    "alias",
    "detach",
    "permute",
    "aten.t.",
    "split",
)


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.views = self.others = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(part in str(operator) for part in VIEWS):
            self.views += 1
        else:
            self.others += 1
        return operator(*args, **(kwargs or {}))


def counted(recipe: str, layers: int) -> tuple[int, int]:
    """Operations that are no views, and views."""
    model = random_model("cpu", torch.float32, "tiny", hidden_size=64, head_dim=16, num_hidden_layers=layers)
    if recipe != TEACHER:
        model = convert(model, recipe)
    model.requires_grad_(False).eval()
    ids = torch.arange(5, 5 + TOKENS).view(1, TOKENS)
    name = cache_name(model)
    with torch.no_grad(), nullcontext() if recipe == TEACHER else dispatch.kernels("triton"):
        for mode in (nullcontext(), _Counted()):  # what the first call alone makes is left out
            with mode:
                model(
                    input_ids=ids,
                    use_cache=True,
                    logits_to_keep=1,
                    **{name: DynamicCache(config=model.config)},
                )
    return mode.others, mode.views


def main(recipes: list[str]) -> int:
    """A line a recipe."""
    for recipe in recipes or [TEACHER, "lolcats"]:
        few, many = counted(recipe, 2), counted(recipe, 4)
        others, views = ((more - less) / 2 for less, more in zip(few, many, strict=True))
        print(f"{recipe:28} {others:6.1f} operations a layer, {views:6.1f} views", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
