"""A step of many sequences against each sequence alone: pages reused, chunks of any length, texts broken off."""

from __future__ import annotations

import random

import compositions
import pytest
import torch
from compositions import SHAPES, Draw, label, registered

from linearize.mixers import build
from linearize.recording import record
from linearize.serve.vllm.pages import ALIGNED, Layout, load, store
from linearize.serve.vllm.rows import Decodes, groups, run

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


def step_inputs(mixer, texts: int, seed: int, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """One token of each text."""
    drawn = Draw.of(SHAPE, texts, torch.float64, batch=1, seed=seed)
    return {name: x.to(device, dtype) for name, x in inputs(mixer, drawn).items()}


def pages_of(layout: Layout, device: str) -> torch.Tensor:
    return torch.zeros(8, layout.bytes, dtype=torch.uint8, device=device)


SLOTS = [(3, 5, 1, 0, 0), (5, 3, 7, 2, 0), (1, 2, 6, 3, 5)]
"""Pages of five rows in three steps, zeros are what pads."""
SEEN = [(4, 1, 9, 0, 0), (2, 5, 1, 1, 0), (10, 2, 1, 6, 3)]
"""Tokens of each text with the new one."""


@pytest.mark.parametrize("section", FIXED, ids=label)
@torch.no_grad()
def test_decoding_in_memory_that_stays(section):
    """Rows that pad a graph change nothing: texts and states are those of the group of the real ones."""
    mixer = compositions.make(section, SHAPE, torch.float64)
    layout = Layout.of(mixer, torch.float64)
    decodes = Decodes(6, torch.device("cpu"))
    pages, other = pages_of(layout, "cpu"), pages_of(layout, "cpu")
    for step, (slots, seen) in enumerate(zip(SLOTS, SEEN, strict=True)):
        given = step_inputs(mixer, 5, step, torch.float64, "cpu")
        real = sum(slot > 0 for slot in slots)
        starts = [min(row, real) for row in range(6)]
        assert decodes.fits(starts)
        out, expected = (torch.full((5, SHAPE.heads, SHAPE.value_dim), torch.nan).double() for _ in range(2))
        place, length = torch.tensor(slots, dtype=torch.int32), torch.tensor(seen, dtype=torch.int32)
        run(mixer, given, [decodes.group(place, length)], layout.views(pages), out)
        run(mixer, given, groups(starts, place, length), layout.views(other), expected)
        torch.testing.assert_close(out[:real], expected[:real], rtol=1e-9, atol=1e-9)
    for name, view in layout.views(pages).items():
        torch.testing.assert_close(view[1:], layout.views(other)[name][1:], rtol=1e-9, atol=1e-9)


def test_what_is_no_decoding():
    """A longer text, a gap in the middle and more texts than there is room for are not of one token each."""
    decodes = Decodes(3, torch.device("cpu"))
    assert decodes.fits([0, 1]) and decodes.fits([0, 1, 2, 2])
    assert not any(map(decodes.fits, ([0], [0, 2], [0, 1, 1, 2], [0, 1, 3], [0, 1, 2, 3, 4])))
    group = decodes.group(torch.tensor([4, -1]), torch.tensor([1, 0]))
    assert group.slots.tolist() == [4, 0] and group.fresh.tolist() == [True, True]
    assert group.slots.data_ptr() == decodes.group(torch.tensor([2]), torch.tensor([7])).slots.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("section", FIXED, ids=label)
@torch.no_grad()
def test_decoding_in_a_graph(section):
    """A captured step, replayed on other texts, other pages and fewer rows, is the step."""
    mixer = compositions.make(section, SHAPE, torch.float32).cuda()
    layout, device = Layout.of(mixer, torch.bfloat16), torch.device("cuda")
    decodes = Decodes(6, device)
    pages, other = pages_of(layout, "cuda"), pages_of(layout, "cuda")
    views = layout.views(pages)
    given = step_inputs(mixer, 5, 9, torch.bfloat16, "cuda")
    out = torch.zeros(5, SHAPE.heads, SHAPE.value_dim, dtype=torch.bfloat16, device=device)
    group = decodes.group(torch.zeros(5, dtype=torch.int32).cuda(), torch.zeros(5, dtype=torch.int32).cuda())

    def once() -> None:
        run(mixer, given, [group], views, out)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        once(), once()
    torch.cuda.current_stream().wait_stream(side)
    graph, _ = record(once)
    pages.zero_()
    for step, (slots, seen) in enumerate(zip(SLOTS, SEEN, strict=True)):
        for name, x in step_inputs(mixer, 5, step, torch.bfloat16, "cuda").items():
            given[name].copy_(x)
        place, length = torch.tensor(slots).cuda(), torch.tensor(seen).cuda()
        decodes.group(place, length)
        graph.replay()
        expected = torch.zeros_like(out)
        real = sum(slot > 0 for slot in slots)
        starts = [min(row, real) for row in range(6)]
        run(mixer, given, groups(starts, place, length), layout.views(other), expected)
        apart = (out[:real].float() - expected[:real].float()).abs().max()
        assert apart <= 0.02 * expected.float().abs().max(), apart


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
    kinds = {name: place.dtype for name, place in layout.places.items()}
    assert kinds["sums"] == kinds["norms"] == torch.float32 and torch.bfloat16 in kinds.values()
    views = layout.views(torch.zeros(3, layout.bytes, dtype=torch.uint8))
    slots, fresh = torch.tensor([2]), torch.tensor([True])
    for number, name in enumerate(state):
        state[name] = torch.full_like(state[name], number % 2 if state[name].dtype == torch.bool else number)
    store(views, slots, state)
    again = load(views, slots, ~fresh)
    assert all(torch.equal(again[name], state[name]) for name in state)
    assert not any(view[:2].any() for view in views.values())
    assert not any(x.any() for x in load(views, slots, fresh).tensors.values())
