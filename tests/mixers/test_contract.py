"""The contract of every mixer: parallel, chunked and one-token forms are one function.

`compositions.registered` finds what is registered by itself: a new part needs no line here.
"""

from __future__ import annotations

import itertools

import covering
import pytest
import torch
from compositions import SHAPES, Draw, label, make, registered
from rounding import close, moved, moves
from saved_once import unpacked_once

from linearize.mixers import PARTS, build

mixers = pytest.mark.parametrize("mixer", registered(), ids=label)


def rarely(mixer: dict) -> bool:
    """Whether others between them have all that it has: every test runs it, but not in every way at each change."""
    return label(mixer) not in covering.compositions()


placed = pytest.mark.parametrize(
    ("mixer", "shape"),
    [
        pytest.param(mixer, shape, id=f"{label(mixer)}-{name}", marks=marks)
        for mixer in registered()
        for name, shape in SHAPES.items()
        # soft caps and the teacher's own windows are read by windows
        for marks in (
            [pytest.mark.slow] if name == "capped" and ("window" not in mixer or rarely(mixer)) else [],
        )
    ],
)
PRECISIONS = [("f32", torch.float32, 1e-5), ("f64", torch.float64, 1e-10)]


def test_every_part_is_covered():
    used = {(part, options["name"]) for mixer in registered() for part, options in mixer.items()}
    used |= {(part, default) for part, (_, default) in PARTS.items()}
    missing = {(part, name) for part, (registry, _) in PARTS.items() for name in registry.names()} - used
    assert not missing


# in float32 a text that is longer than a chunk tells more than a short one
TEXTS = [
    pytest.param(tokens, dtype, tolerance, id=f"{name}-{tokens}", marks=marks)
    for name, dtype, tolerance in PRECISIONS
    for tokens in (1, 7, 131)
    for marks in ([pytest.mark.slow] if name == "f32" and tokens < 131 else [],)
]


@placed
@pytest.mark.parametrize(("tokens", "dtype", "tolerance"), TEXTS)
def test_chunked_equals_parallel(mixer, shape, dtype, tolerance, tokens):
    made = make(mixer, shape, dtype)
    x = Draw.of(shape, tokens, dtype)
    expected = x.run(made.parallel)
    assert expected.shape == (2, tokens, shape.heads, shape.value_dim)
    assert expected.dtype == dtype
    close(x.run(made.chunked), expected, tolerance, moves(mixer, shape, x))


@pytest.mark.parametrize("mixer", registered()[::16], ids=label)
def test_float32_is_as_near_as_its_rounding(mixer):
    """To what float64 makes of the same numbers, in either form: that is what `moved` says."""
    shape = SHAPES["capped"]
    made, x = make(mixer, shape, torch.float32), Draw.of(shape, 131, torch.float32)
    exact = x.apply(torch.Tensor.double).run(make(mixer, shape, torch.float32).double().parallel)
    allowed = moved(mixer, shape, x)
    assert 1e-9 < allowed.max() / exact.abs().max() < 1e-4
    for form in (made.parallel, made.chunked):
        close(x.run(form).double(), exact, 1e-6, lambda: allowed)


@placed
def test_steps_equal_parallel(mixer, shape):
    made = make(mixer, shape, torch.float64)
    x = Draw.of(shape, 77, torch.float64)
    state = made.initial_state(2, torch.float64, x.q.device)
    before = {name: state[name].data_ptr() for name in state}
    steps = [x[t : t + 1].run(made.step, state=state) for t in range(77)]
    close(torch.cat(steps, 1), x.run(made.parallel))
    if mixer.get("window", {}).get("name") != "full":
        assert {name: state[name].data_ptr() for name in state} == before, "decoding must write in place"


# two thirds of the calls are single tokens, whose arithmetic in float32 no other cut changes; of the last cut nearly
# all are, and `test_steps_equal_parallel` takes single tokens from the first one on
CUTS = [(70, 100), (3, 4), (64, 128), (1, 130)]
ALL, SOME = {("f64", CUTS[0]), ("f64", CUTS[1])}, {("f32", CUTS[0]), ("f64", CUTS[2])}
"""What every mixer is cut into at each change, and what those are that are not `rarely` run."""
PRECISE = [
    pytest.param(mixer, cuts, dtype, tolerance, id=f"{name}-{cuts}-{label(mixer)}", marks=marks)
    for name, dtype, tolerance in PRECISIONS
    for cuts in CUTS
    for mixer in registered()
    for quick in ((name, cuts) in ALL or ((name, cuts) in SOME and not rarely(mixer)),)
    for marks in ([] if quick else [pytest.mark.slow],)
]


@pytest.mark.parametrize(("mixer", "cuts", "dtype", "tolerance"), PRECISE)
def test_state_carries_across_calls(mixer, dtype, tolerance, cuts):
    """Prefill, single tokens, and a second prefill, with left padding in the first call."""
    shape = SHAPES["grouped"]
    made = make(mixer, shape, dtype)
    x = Draw.of(shape, 131, dtype)
    valid = torch.ones(2, 131, dtype=torch.bool)
    valid[0, : cuts[0] // 2] = False
    expected = x.run(made.parallel, valid=valid)
    state = made.initial_state(2, dtype, x.q.device)
    first, second = cuts
    with torch.no_grad():
        parts = [x[:first].run(made.chunked, valid=valid[:, :first], state=state)]
        parts += [x[t : t + 1].run(made.step, state=state) for t in range(first, second)]
        parts.append(x[second:].run(made.chunked, state=state))
    out = torch.cat(parts, 1)
    out[~valid] = expected[~valid]  # which is nobody's
    close(out, expected, tolerance, moves(mixer, shape, x, valid=valid))


@mixers
def test_a_document_may_begin_in_any_call(mixer):
    """Also in a call of one token, as the chunks of a teacher's own layer do; a state of the one before is let go."""
    shape = SHAPES["grouped"]
    made = make(mixer, shape, torch.float64)
    x, tokens = Draw.of(shape, 75, torch.float64), 75
    starts = torch.zeros(2, tokens, dtype=torch.bool)
    starts[0, [1, 3, 20, 40, 41, 64]] = True
    starts[1, [2, 21, 42]] = True
    expected = x.run(made.parallel, starts=starts)
    with torch.no_grad():
        for cuts in (list(range(tokens)), [0, 20, 21, 22, 40, 41, 42, 43], [0, 5, 45, 64]):
            state, parts = made.initial_state(2, torch.float64, x.q.device), []
            for first, last in zip(cuts, [*cuts[1:], tokens], strict=True):
                begins = starts[:, first:last]
                single = last - first == 1 and not begins.any()
                how = {} if single else {"starts": begins}
                parts.append(x[first:last].run(made.step if single else made.chunked, state=state, **how))
            close(torch.cat(parts, 1), expected)


@placed
def test_left_padding_changes_nothing(mixer, shape):
    made = make(mixer, shape, torch.float64)
    x = Draw.of(shape, 90, torch.float64, batch=1)
    padded = Draw.of(shape, 13, torch.float64, batch=1, seed=9).join(x)
    valid = torch.ones(1, 103, dtype=torch.bool)
    valid[:, :13] = False
    for form in (made.parallel, made.chunked):
        out = padded.run(form, valid=valid)
        assert out.isfinite().all()
        close(out[:, 13:], x.run(form))


@mixers
@pytest.mark.parametrize("gaps", [None, False])
def test_a_call_of_padding_alone_leaves_the_state_empty(mixer, gaps):
    """A long prompt beside a short one, in pieces: the short one's first piece is padding, and has no gap in it."""
    made = make(mixer, SHAPES["grouped"], torch.float64)
    x, state = (
        Draw.of(SHAPES["grouped"], 40, torch.float64),
        made.initial_state(2, torch.float64, torch.device("cpu")),
    )
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[0, :7] = False
    with torch.no_grad():
        parts = [x[:6].run(made.chunked, valid=valid[:, :6], state=state, gaps=gaps)]
        parts.append(x[6:20].run(made.chunked, valid=valid[:, 6:20], state=state))
        parts += [x[t : t + 1].run(made.step, state=state) for t in range(20, 40)]
    close(torch.cat(parts, 1)[valid], x.run(made.parallel, valid=valid)[valid])


@mixers
def test_padding_behind_a_text_leaves_its_state(mixer):
    """More of it than a chunk, and calls in which a row has no token: it goes on as the row without them."""
    made, tokens = make(mixer, SHAPES["grouped"], torch.float64), 24
    x = Draw.of(SHAPES["grouped"], tokens, torch.float64)
    own = [13, 16]  # what a state is split by, a power of two among others, ends here and goes on there
    state, read, outs = made.initial_state(2, torch.float64, x.q.device), [0, 0], [[], []]
    # tokens of each row, and how long the call is
    for counts, length in ((own, 150), ((0, 1), 2), ((1, 0), 1), ((0, 0), 70), ((3, 0), 3), ((0, 2), 5)):
        at = torch.arange(length)
        taken = torch.stack([(first + at).clamp_max(tokens - 1) for first in read])
        valid = at < torch.tensor(counts)[:, None]
        piece = x.apply(lambda y, taken=taken: torch.stack([row[i] for row, i in zip(y, taken, strict=True)]))
        with torch.no_grad():
            out = piece.run(made.step if length == 1 else made.chunked, valid=valid, state=state)
        for row, count in enumerate(counts):
            outs[row].append(out[row, :count])
            read[row] += count
    expected = x.run(made.parallel)
    for row, count in enumerate(read):
        close(torch.cat(outs[row]), expected[row, :count])


@placed
def test_packed_documents_do_not_see_each_other(mixer, shape):
    made = make(mixer, shape, torch.float64)
    lengths = [3, 61, 2, 40, 70]
    x = Draw.of(shape, sum(lengths), torch.float64, batch=1)
    starts = torch.zeros(1, sum(lengths), dtype=torch.bool)
    bounds = [0, *itertools.accumulate(lengths)]
    starts[0, bounds[1:-1]] = True
    alone = torch.cat([x[a:b].run(made.parallel) for a, b in itertools.pairwise(bounds)], 1)
    state = made.initial_state(1, torch.float64, x.q.device)
    close(x.run(made.parallel, starts=starts), alone)
    with torch.no_grad():
        close(x.run(made.chunked, starts=starts, state=state), alone)
    # the carried state is that of the last document alone
    more = Draw.of(shape, 9, torch.float64, batch=1, seed=5)
    steps = [more[t : t + 1].run(made.step, state=state) for t in range(9)]
    close(torch.cat(steps, 1), x[bounds[-2] :].join(more).run(made.parallel)[:, -9:])


@placed
def test_gradients_are_equal_and_finite(mixer, shape):
    made = make(mixer, shape, torch.float64)
    valid = torch.ones(2, 75, dtype=torch.bool)
    valid[0, :10] = False
    starts = torch.zeros(2, 75, dtype=torch.bool)
    starts[1, 33] = True
    gradients = []
    for form in (made.parallel, made.chunked):
        x = Draw.of(shape, 75, torch.float64).apply(lambda y: y.requires_grad_())
        with unpacked_once():
            out = x.run(form, valid=valid, starts=starts)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        wanted = [*x.tensors, *made.parameters()]
        gradients.append(torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True))
    names = ["q", "k", "v", "hidden", "plain q", "plain k", "first", *(n for n, _ in made.named_parameters())]
    for name, dense, chunked in zip(names, *gradients, strict=True):
        if dense is None or chunked is None:
            assert name in names[:7], f"{name} gets no gradient"
            continue
        assert dense.isfinite().all()
        assert name in names[:7] or dense.abs().max() > 0, f"{name} gets no gradient"
        close(chunked, dense, 1e-9)


@mixers
def test_causal(mixer):
    shape = SHAPES["grouped"]
    made = make(mixer, shape, torch.float64)
    x = Draw.of(shape, 80, torch.float64)
    changed = x[:50].join(x[50:].apply(lambda y: y + 1.0))
    out, other = x.run(made.chunked), changed.run(made.chunked)
    close(other[:, :50], out[:, :50], 1e-12)
    assert (out[:, 50:] - other[:, 50:]).abs().max() > 1e-3


@mixers
def test_weights_reproduce_the_output(mixer):
    """`parallel` without values gives weights that reproduce the output, before norms and gates of the output.

    A learned start, what a later step adds to its value, and the first layer's values answer too and belong to no key.
    """
    shape = SHAPES["grouped"]
    made = make(mixer, shape, torch.float64)
    x = Draw.of(shape, 30, torch.float64)
    context = {"hidden": x.hidden, "plain": x.plain, "first": x.first}
    weights = made.parallel(x.q, x.k, None, rows=slice(10, 25), **context)
    convolved = made.recurrent is not None and made.recurrent.short_conv is not None
    normed = made.recurrent is not None and type(made.recurrent.normalizer).__name__ == "GroupNorm"
    by_dim = type(made.update).__name__ == "GatedDelta2"
    begun = made.update is not None and (
        made.update.learned is not None or made.uses_first or made.update.name == "delta_product"
    )
    if made.output is not None or normed or convolved or by_dim or begun:
        assert weights.shape == (2, 15, shape.heads, 30)
        return
    wide = x.v.repeat_interleave(shape.group, dim=2)
    close(torch.einsum("brhs,bshv->brhv", weights, wide), x.run(made.parallel)[:, 10:25])


@mixers
def test_beams_reorder_and_repeat(mixer):
    shape = SHAPES["grouped"]
    made = make(mixer, shape, torch.float64)
    x = Draw.of(shape, 21, torch.float64)
    state = made.initial_state(2, torch.float64, x.q.device)
    with torch.no_grad():
        x[:20].run(made.chunked, state=state)
    order = torch.tensor([1, 0, 1])
    state.select(order)
    out = x[20:].apply(lambda y: y[order]).run(made.step, state=state)
    close(out, x.run(made.parallel)[order, 20:])
    state.repeat(2)
    assert state.batch == 6


@mixers
def test_bytes_and_parameters_are_counted(mixer):
    made = build(mixer, SHAPES["grouped"])
    assert made.added_parameters == sum(p.numel() for p in made.parameters())
    assert (
        made.state_bytes(3, torch.float32) == made.initial_state(3, torch.float32, torch.device("cpu")).bytes
    )


@mixers
def test_initial_values_return(mixer):
    made = build(mixer, SHAPES["grouped"])
    torch.manual_seed(1)
    made.reset_parameters()
    start = {name: value.clone() for name, value in made.state_dict().items()}
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    torch.manual_seed(1)
    made.reset_parameters()
    for name, value in made.state_dict().items():
        assert torch.equal(value, start[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "mixer", [m for m in registered() if m.get("window", {}).get("name") != "full"], ids=label
)
def test_long_bfloat16_decode_stays_close(mixer):
    """20,000 tokens of bfloat16 inputs into a carried state, the last ones step by step, against float32.

    Peers keep the normalizer in bfloat16, where it stops growing: a third is missing after 4,000 tokens.
    """
    shape, tokens = SHAPES["grouped"], 20_000
    made = make(mixer, shape, torch.float32)
    x = Draw.of(shape, tokens, torch.bfloat16, batch=1)
    state, exact = (made.initial_state(1, dtype, x.q.device) for dtype in (torch.bfloat16, torch.float32))
    with torch.no_grad():
        for first in range(0, tokens - 50, 3990):
            piece = x[first : first + 3990]
            piece.run(made.chunked, state=state)
            piece.apply(lambda y: y.float()).run(made.chunked, state=exact)
        last = x[tokens - 50 :]
        reference = last.apply(lambda y: y.float()).run(made.chunked, state=exact)
        out = torch.cat([last[t : t + 1].run(made.step, state=state) for t in range(50)], 1)
    assert (out - reference).norm() < 0.02 * reference.norm()


@placed
def test_padding_anywhere_changes_nothing(mixer, shape):
    """Rows with gaps of their own, in every form, fed in pieces that begin and end in padding: the rows without it."""
    made = make(mixer, shape, torch.float64)
    x = Draw.of(shape, 60, torch.float64, batch=3)
    valid = torch.rand(3, 60, generator=torch.Generator().manual_seed(4)) > 0.3
    valid[0, 20:29], valid[1, :12], valid[2, 50:] = False, False, False
    alone = [x.apply(lambda y, r=r: y[r : r + 1, valid[r]]).run(made.parallel)[0] for r in range(3)]
    for form in (made.parallel, made.chunked):
        out = x.run(form, valid=valid)
        assert out.isfinite().all()
        for row in range(3):
            close(out[row, valid[row]], alone[row])
    state = made.initial_state(3, torch.float64, x.q.device)
    outs, end = [], 0
    with torch.no_grad():
        for piece in (3, 1, 1, 9, *[1] * 16, 12, 2, 1, 15):
            first, end = end, end + piece
            form = made.step if piece == 1 else made.chunked
            outs.append(x[first:end].run(form, valid=valid[:, first:end], state=state))
    for row in range(3):
        close(torch.cat(outs, 1)[row, valid[row]], alone[row])


@mixers
def test_documents_with_gaps_do_not_see_each_other(mixer):
    shape = SHAPES["grouped"]
    made = make(mixer, shape, torch.float64)
    x = Draw.of(shape, 60, torch.float64, batch=1)
    valid = torch.rand(1, 60, generator=torch.Generator().manual_seed(5)) > 0.3
    starts = torch.zeros(1, 60, dtype=torch.bool)
    bounds = [0, 7, 11, 40, 60]
    for first in bounds[1:-1]:
        starts[0, first + int(valid[0, first:].int().argmax())] = True
    pieces = [(a, b, valid[0, a:b]) for a, b in itertools.pairwise(bounds)]
    alone = torch.cat(
        [x[a:b].apply(lambda y, kept=kept: y[:, kept]).run(made.parallel) for a, b, kept in pieces], 1
    )
    close(x.run(made.parallel, valid=valid, starts=starts)[valid][None], alone)
    close(x.run(made.chunked, valid=valid, starts=starts)[valid][None], alone)
    state = made.initial_state(1, torch.float64, x.q.device)
    with torch.no_grad():
        cuts = [
            x[a:b].run(made.chunked, valid=valid[:, a:b], starts=starts[:, a:b], state=state)
            for a, b in ((0, 20), (20, 60))
        ]
    close(torch.cat(cuts, 1)[valid][None], alone)
