"""On a GPU no recipe's mixers hand a float32 copy of the text to a kernel or a product, and nothing loops over tokens.

On fake tensors in bfloat16, dispatch as with a GPU; `scripts/kernels/train_recipes.py` asks the same of a real one.
"""

from __future__ import annotations

from contextlib import ExitStack

import covering
import pytest
import torch
from on_paper import META, SIZES, on_paper, to_paper
from torch import Tensor
from watched import Watched

from linearize import surgery
from linearize.bench.subjects import convert, layers_of_each, random_model, subjects

LENGTHS = (96, 192)


def looked_at(model, tokens: int, *, backward: bool = True) -> Watched:
    ids = torch.ones(2, tokens, dtype=torch.int64, device=META)
    positions = torch.arange(tokens, device=META).repeat(2, 1) % 50
    config = model.config
    look = Watched(tokens, 2 * tokens * config.num_key_value_heads * config.head_dim)
    with look.mixers():
        made: Tensor = model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        if backward:
            made.sum().backward()
    return look


@pytest.mark.parametrize("name", covering.recipes(subjects()))
def test_every_recipe(name, monkeypatch):
    sizes = {**SIZES, "num_hidden_layers": layers_of_each(name)}
    model = convert(random_model("cpu", torch.bfloat16, "tiny", **sizes), name).train()
    levels = any(hasattr(layer.mixer.update, "levels") for layer in surgery.converted(model))
    lengths = (*LENGTHS, 2 * LENGTHS[-1]) if levels else LENGTHS
    with on_paper(monkeypatch, triton=True), ExitStack() as stack:
        to_paper(model)
        stack.enter_context(surgery.trusting(model))
        looked_at(model, LENGTHS[0], backward=False)  # the first pass of all does more
        short, long, *longer = (looked_at(model, tokens) for tokens in lengths)
    if longer:
        # at most a level more for twice the text, not a loop over tokens; none where all levels are read together
        assert long.operations - short.operations == longer[0].operations - long.operations >= 0
    else:
        # a text shorter than a window of blocks has some more
        assert short.operations >= long.operations
    assert short.kernels and not short.wide, dict(short.wide)


def test_a_loop_and_a_wide_copy_are_seen(monkeypatch):
    """What the check is made for."""
    look = Watched(4, 8)
    x = torch.zeros(4, 2, dtype=torch.bfloat16)
    with look:
        look._depth = 1
        (x.float() @ torch.zeros(2, 4)).sum()
    assert dict(look.wide) == {"mm self": 1, "mm mat2": 1} and sum(look.casts.values()) == 1
