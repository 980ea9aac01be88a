"""Window geometries against float64 loops written from their definitions, and where they are exact."""

from __future__ import annotations

import pytest
import torch

from linearize.mixers import LayerShape, build, check

HEADS, WIDTH = 4, 8
SHAPE = LayerShape(heads=HEADS, kv_heads=2, key_dim=WIDTH, value_dim=WIDTH, scaling=WIDTH**-0.5)


def mixer(shape: LayerShape = SHAPE, *, recurrent: bool = True, combine: str = "shared_normalizer", **window):
    section = {"window": window, "combine": {"name": combine}}
    if recurrent:
        section["feature_map"] = {"name": "hedgehog", "dim": 6}
    else:
        del section["combine"]
    assert check(section) == []
    made = build(section, shape).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return made


def draw(tokens: int, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, tokens, n, WIDTH, generator=generator, dtype=torch.float64) for n in (HEADS, 2, 2)]


def loop(made, q, k, v, near, far):
    """LoLCATs' equation 7 for one text, with the sets of keys of each query given: near(n), far(n)."""
    out = torch.zeros(q.shape[1], HEADS, WIDTH, dtype=torch.float64)
    for head in range(HEADS):
        keys, values = k[0, :, head // 2], v[0, :, head // 2]
        for n in range(q.shape[1]):
            scores = {i: q[0, n, head] @ keys[i] * WIDTH**-0.5 for i in near(n)}
            sink = made.window.sink_logit
            top = max([*scores.values(), *([] if sink is None else [sink[head]])])
            weights = {i: torch.exp(score - top) for i, score in scores.items()}
            total = sum(weights.values()) + (0 if sink is None else torch.exp(sink[head] - top))
            value = sum(w * values[i] for i, w in weights.items())
            if made.feature_map is not None:
                gate = torch.sigmoid(made.combine.window_factor[head])
                phi_q = phi(q[0, n, head], made.feature_map.query_weight[head])
                late = {i: phi_q @ phi(keys[i], made.feature_map.key_weight[head]) for i in far(n)}
                total = gate * total + sum(late.values())
                value = gate * value + sum(w * values[i] for i, w in late.items())
            out[n, head] = value / total
    return out[None]


def phi(x, weight):
    return torch.cat([torch.softmax(x @ weight, 0), torch.softmax(-(x @ weight), 0)])


def steps(made, q, k, v):
    state = made.initial_state(1, torch.float64, q.device)
    return torch.cat(
        [
            made.step(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], state=state)
            for t in range(q.shape[1])
        ],
        1,
    )


def same(out, expected):
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)


def in_sliding(size: int, first: int):
    def near(n: int) -> list[int]:
        return [i for i in range(n + 1) if i > n - size or i < first]

    return near


def in_terrace(size: int, first: int = 0):
    """The block of query n and the one before it, counted from the start."""

    def near(n: int) -> list[int]:
        return [i for i in range(n + 1) if i // size in (n // size, n // size - 1) or i < first]

    return near


GEOMETRIES = {
    "sliding": ({"name": "sliding", "size": 5}, in_sliding(5, 0)),
    "pinned": ({"name": "sliding", "size": 5, "first": 3}, in_sliding(5, 3)),
    "more_pinned_than_window": ({"name": "sliding", "size": 2, "first": 6}, in_sliding(2, 6)),
    "terraced": ({"name": "terraced", "size": 4}, in_terrace(4)),
    "terraced_1": ({"name": "terraced", "size": 1}, in_terrace(1)),
    "terraced_pinned": ({"name": "terraced", "size": 4, "first": 3}, in_terrace(4, 3)),
}
geometries = pytest.mark.parametrize(("window", "near"), GEOMETRIES.values(), ids=GEOMETRIES)


@geometries
@pytest.mark.parametrize("sinks", ["none", "learned"])
@pytest.mark.parametrize("recurrent", [True, False], ids=["hybrid", "window_only"])
def test_equals_the_geometry_written_out(window, near, sinks, recurrent):
    made = mixer(**window, sinks=sinks, recurrent=recurrent)
    q, k, v = draw(27)
    expected = loop(made, q, k, v, near, lambda n: [i for i in range(n + 1) if i not in near(n)])
    same(made.parallel(q, k, v), expected)
    same(made.chunked(q, k, v), expected)
    same(steps(made, q, k, v), expected)


@geometries
def test_overlap_hands_on_every_key_at_once(window, near):
    made = mixer(**window, overlap=True)
    q, k, v = draw(21)
    expected = loop(made, q, k, v, near, lambda n: range(n + 1))
    same(made.chunked(q, k, v), expected)
    same(steps(made, q, k, v), expected)


@pytest.mark.parametrize("limit", [None, 3], ids=["all", "teacher_slides"])
@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("recurrent", [True, False], ids=["hybrid", "window_only"])
@pytest.mark.parametrize("size", [1, 5])
def test_a_block_is_all_that_its_queries_see(size, recurrent, first, limit):
    shape = LayerShape(HEADS, 2, WIDTH, WIDTH, WIDTH**-0.5, sliding_window=limit)
    made = mixer(shape, name="block", size=size, first=first, sinks="learned", recurrent=recurrent)

    def near(n: int) -> list[int]:
        own = [i for i in range(n // size * size, n + 1) if limit is None or i > n - limit]
        return sorted({*own, *range(min(made.window.first, n + 1))})

    q, k, v = draw(27)
    expected = loop(made, q, k, v, near, lambda n: range(n + 1))
    same(made.parallel(q, k, v), expected)
    same(made.chunked(q, k, v), expected)
    same(steps(made, q, k, v), expected)
    with torch.no_grad():
        state = made.initial_state(1, torch.float64, q.device)
        parts = [made.chunked(*(x[:, a:b] for x in (q, k, v)), state=state) for a, b in ((0, 8), (8, 27))]
    same(torch.cat(parts, 1), expected)


@geometries
@pytest.mark.parametrize("overlap", [False, True], ids=["apart", "overlap"])
def test_outputs_do_not_depend_on_how_many_tokens_follow(window, near, overlap):
    made = mixer(**window, overlap=overlap)
    q, k, v = draw(45)
    whole = made.chunked(q, k, v)
    for length in (*range(1, 14), 21, 32, 44):
        same(made.chunked(q[:, :length], k[:, :length], v[:, :length]), whole[:, :length])


@geometries
@pytest.mark.parametrize("padding", [1, 3, 19])
def test_left_padding_moves_neither_blocks_nor_pinned_tokens(window, near, padding):
    made = mixer(**window)
    q, k, v = draw(30)
    padded = [torch.cat([noise, x], 1) for noise, x in zip(draw(padding, seed=8), (q, k, v), strict=True)]
    valid = torch.arange(padding + 30)[None] >= padding
    expected = made.parallel(q, k, v)
    for form in (made.parallel, made.chunked):
        same(form(*padded, valid=valid)[:, padding:], expected)
    state = made.initial_state(1, torch.float64, q.device)
    outputs = [
        made.step(*(x[:, t : t + 1] for x in padded), state=state, valid=valid[:, t : t + 1])
        for t in range(padding + 30)
    ]
    same(torch.cat(outputs[padding:], 1), expected)


@geometries
def test_padding_inside_a_text_keeps_its_place(window, near):
    """As the second turn of a left-padded batch has it: a gap is no key, and blocks go on across it."""
    made = mixer(**window)
    q, k, v = draw(41)
    valid = torch.rand(1, 41, generator=torch.Generator().manual_seed(3)) > 0.4
    expected = made.parallel(q, k, v, valid=valid)
    same(made.chunked(q, k, v, valid=valid)[valid], expected[valid])
    state = made.initial_state(1, torch.float64, q.device)
    with torch.no_grad():
        outputs = [made.chunked(q[:, :9], k[:, :9], v[:, :9], valid=valid[:, :9], state=state)]
        outputs += [
            made.step(*(x[:, t : t + 1] for x in (q, k, v)), state=state, valid=valid[:, t : t + 1])
            for t in range(9, 30)
        ]
        outputs.append(made.chunked(q[:, 30:], k[:, 30:], v[:, 30:], valid=valid[:, 30:], state=state))
    same(torch.cat(outputs, 1)[valid], expected[valid])


@geometries
def test_every_document_has_its_own_start(window, near):
    """Documents of every length around the blocks' borders, each preceded by padding of its own."""
    made = mixer(**window)
    texts = [draw(length, seed=length) for length in (1, 3, 4, 5, 9, 2, 12, 8, 1, 17)]
    padded, valid, starts = [], [], []
    for number, text in enumerate(texts):
        lead = number % 3
        padded.append([torch.cat([noise, x], 1) for noise, x in zip(draw(lead, seed=99), text, strict=True)])
        valid += [False] * lead + [True] * text[0].shape[1]
        starts += [True] + [False] * (lead + text[0].shape[1] - 1)
    q, k, v = (torch.cat(parts, 1) for parts in zip(*padded, strict=True))
    valid, starts = torch.tensor([valid]), torch.tensor([starts])
    expected = torch.cat([made.parallel(*text) for text in texts], 1)
    for form in (made.parallel, made.chunked):
        same(form(q, k, v, valid=valid, starts=starts)[valid][None], expected)
    state = made.initial_state(1, torch.float64, q.device)
    with torch.no_grad():
        made.chunked(q, k, v, valid=valid, starts=starts, state=state)
        more = draw(20, seed=7)
        last = [torch.cat(pair, 1) for pair in zip(texts[-1], more, strict=True)]
        outputs = [made.step(*(x[:, t : t + 1] for x in more), state=state) for t in range(20)]
    same(torch.cat(outputs, 1), made.parallel(*last)[:, -20:])


@geometries
def test_rows_of_a_batch_begin_their_blocks_apart(window, near):
    """Decoding a left-padded batch: each row's state hands on its own blocks at its own time."""
    made = mixer(**window)
    texts = [draw(length, seed=length) for length in (30, 29, 25, 18)]
    q, k, v = (
        torch.cat(
            [torch.cat([torch.ones_like(x)[:, :1].expand(-1, 30 - x.shape[1], -1, -1), x], 1) for x in xs]
        )
        for xs in zip(*texts, strict=True)
    )
    valid = torch.arange(30)[None] >= torch.tensor([[0], [1], [5], [12]])
    state = made.initial_state(4, torch.float64, q.device)
    with torch.no_grad():
        outputs = [made.chunked(q[:, :13], k[:, :13], v[:, :13], valid=valid[:, :13], state=state)]
        outputs += [made.step(*(x[:, t : t + 1] for x in (q, k, v)), state=state) for t in range(13, 30)]
    for row, text in enumerate(texts):
        same(torch.cat(outputs, 1)[row : row + 1][valid[row : row + 1]], made.parallel(*text)[0])


@geometries
@pytest.mark.parametrize("limit", [3, 6, 11])
def test_no_key_is_seen_that_the_teacher_does_not_see(window, near, limit):
    """A layer whose teacher slides: pinned tokens excepted, the softmax stays inside the teacher's window."""
    made = mixer(LayerShape(HEADS, 2, WIDTH, WIDTH, WIDTH**-0.5, sliding_window=limit), **window)
    pinned = made.window.first
    assert pinned == (window.get("first", 0) if window["size"] < limit else 0)
    q, k, v = draw(25)

    def seen(n: int) -> list[int]:
        kept = (
            in_terrace(window["size"])(n)
            if window["name"] == "terraced"
            else range(n - window["size"] + 1, n + 1)
        )
        return [i for i in range(n + 1) if (i in kept and i > n - limit) or i < pinned]

    def late(n: int) -> list[int]:
        size = min(window["size"], limit)
        kept = in_terrace(window["size"])(n) if window["name"] == "terraced" else range(n - size + 1, n + 1)
        return [i for i in range(n + 1) if i not in kept and i >= pinned]

    expected = loop(made, q, k, v, seen, late)
    same(made.parallel(q, k, v), expected)
    same(made.chunked(q, k, v), expected)
    same(steps(made, q, k, v), expected)


@pytest.mark.parametrize("limit", [None, 9], ids=["all", "teacher_slides"])
@pytest.mark.parametrize(
    "window", [{"name": "sliding"}, {"name": "sliding", "first": 4}, {"name": "terraced"}]
)
@pytest.mark.parametrize("recurrent", [True, False], ids=["hybrid", "window_only"])
def test_window_longer_than_the_text_is_the_teacher(window, recurrent, limit):
    shape = LayerShape(HEADS, 2, WIDTH, WIDTH, WIDTH**-0.5, sliding_window=limit)
    q, k, v = draw(9 if recurrent and limit else 40)
    teacher = build({"window": {"name": "full"}}, shape).chunked(q, k, v)
    same(mixer(shape, **window, size=40, recurrent=recurrent).chunked(q, k, v), teacher)


def test_learned_sinks_start_at_the_teacher():
    section = {"window": {"name": "sliding", "size": 40, "sinks": "learned"}}
    q, k, v = draw(40)
    teacher = build({"window": {"name": "full"}}, SHAPE).chunked(q, k, v)
    made = build(section, SHAPE)
    assert made.added_parameters == HEADS
    torch.testing.assert_close(made.double().chunked(q, k, v), teacher, atol=5e-4, rtol=0)


def test_pinned_tokens_take_fixed_room_in_the_state():
    plain, pinned = mixer(name="sliding", size=5), mixer(name="sliding", size=5, first=4)
    assert pinned.state_bytes() - plain.state_bytes() == 4 * (2 * 2 * WIDTH * 2 + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "sliding", "size": 0}, "size: must be at least 1"),
        ({"name": "terraced", "size": -1}, "size: must be at least 1"),
        ({"name": "sliding", "first": -2}, "first: must be at least 0"),
        ({"name": "terraced", "sinks": "some"}, "'some' is not one of none, learned"),
        ({"name": "block", "overlap": False}, "overlap: false has no meaning with blocks"),
    ],
)
def test_impossible_options_are_refused(options, message):
    assert message in "\n".join(check({"window": options}))
