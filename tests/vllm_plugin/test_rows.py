"""A step of many sequences against each sequence alone: pages reused, chunks of any length, texts broken off."""

from __future__ import annotations

import random

import compositions
import pytest
import torch
from compositions import SHAPES, Draw, label, registered

from linearize.mixers import build
from linearize.serve.vllm.pages import ALIGNED, Layout, load, store
from linearize.serve.vllm.rows import groups, run

SHAPE = SHAPES["grouped"]
FIXED = [x for x in map(compositions.small, registered()) if build(x, SHAPE).has_fixed_state]
PAGES, TEXTS, LONGEST = 3, 8, 17


def inputs(mixer, drawn: Draw) -> dict[str, torch.Tensor]:
    """One text's, as the layer hands them over: [T, ...]."""
    found = {"q": drawn.q, "k": drawn.k, "v": drawn.v}
    if mixer.uses_hidden:
        found["hidden"] = drawn.hidden
    if mixer.needs_plain:
        found |= {"plain_q": drawn.plain[0], "plain_k": drawn.plain[1]}
    if mixer.uses_first:
        found["first"] = drawn.first
    return {name: x[0] for name, x in found.items()}


def alone(mixer, drawn: Draw) -> torch.Tensor:
    given = {"hidden": drawn.hidden} if mixer.uses_hidden else {}
    if mixer.needs_plain:
        given["plain"] = drawn.plain
    if mixer.uses_first:
        given["first"] = drawn.first
    return mixer.chunked(drawn.q, drawn.k, drawn.v, **given)[0]


@pytest.mark.parametrize("section", FIXED, ids=label)
@torch.no_grad()
def test_serving(section):
    """Texts come and go on three pages, whose memory held something else before."""
    mixer = compositions.make(section, SHAPE, torch.float64)
    layout = Layout.of(mixer, torch.float64)
    views = layout.views(torch.full((PAGES + 1, layout.bytes + ALIGNED), 255, dtype=torch.uint8))
    dice = random.Random(0)
    draws = [
        Draw.of(SHAPE, dice.choice([1, 2, dice.randint(3, LONGEST)]), torch.float64, batch=1, seed=n)
        for n in range(TEXTS)
    ]
    texts = [inputs(mixer, drawn) for drawn in draws]
    outs = [torch.full((len(x["v"]), SHAPE.heads, SHAPE.value_dim), torch.nan).double() for x in texts]
    waiting, running, done = list(range(TEXTS)), {}, []
    free = list(range(1, PAGES + 1))
    while waiting or running:
        while waiting and free:
            running[waiting.pop(0)] = (free.pop(dice.randrange(len(free))), 0)
        step = [n for n in running if dice.random() < 0.8]
        dice.shuffle(step)
        new = [min(dice.choice([1, 1, 2, 5]), len(texts[n]["v"]) - running[n][1]) for n in step]
        if step:
            cuts = [slice(running[n][1], running[n][1] + count) for n, count in zip(step, new, strict=True)]
            whole = {
                name: torch.cat([texts[n][name][cut] for n, cut in zip(step, cuts, strict=True)])
                for name in texts[0]
            }
            starts = [0, *torch.tensor(new).cumsum(0).tolist()]
            slots = torch.tensor([running[n][0] for n in step], dtype=torch.int32)
            lengths = torch.tensor([cut.stop for cut in cuts], dtype=torch.int32)
            out = torch.full((starts[-1], SHAPE.heads, SHAPE.value_dim), torch.nan).double()
            run(mixer, whole, groups(starts, slots, lengths), views, out)
            for row, (n, cut) in enumerate(zip(step, cuts, strict=True)):
                outs[n][cut] = out[starts[row] : starts[row + 1]]
                running[n] = (running[n][0], cut.stop)
        for n in list(running):
            page, seen = running[n]
            if seen == len(texts[n]["v"]) or dice.random() < 0.02:
                free.append(page)
                del running[n]
                done.append((n, seen))
    assert sum(seen == len(texts[n]["v"]) for n, seen in done) > TEXTS // 2
    for n, seen in done:
        torch.testing.assert_close(outs[n][:seen], alone(mixer, draws[n])[:seen], rtol=1e-7, atol=1e-7)


def test_layout():
    """Sums stay float32 beside keys and values in the model's dtype, and each tensor has bytes of its own."""
    section = compositions.small(
        {"feature_map": compositions.HEDGEHOG, "window": {"name": "sliding", "size": 5}}
    )
    mixer = build(section, SHAPE)
    layout = Layout.of(mixer, torch.bfloat16)
    state = mixer.initial_state(1, torch.bfloat16, torch.device("cpu"))
    assert {name: (place.shape, place.dtype) for name, place in layout.places.items()} == {
        name: (tuple(x.shape[1:]), x.dtype) for name, x in state.tensors.items()
    }
    assert torch.float32 in {place.dtype for place in layout.places.values()}
    views = layout.views(torch.zeros(3, layout.bytes, dtype=torch.uint8))
    slots, fresh = torch.tensor([2]), torch.tensor([True])
    for number, name in enumerate(state):
        state[name] = torch.full_like(state[name], number % 2 if state[name].dtype == torch.bool else number)
    store(views, slots, state)
    again = load(views, slots, ~fresh)
    assert all(torch.equal(again[name], state[name]) for name in state)
    assert not any(view[:2].any() for view in views.values())
    assert not any(x.any() for x in load(views, slots, fresh).tensors.values())
