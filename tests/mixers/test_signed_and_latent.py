"""Latte, InLine and MALA against sums over pairs of tokens, written from their papers."""

from __future__ import annotations

import pytest
import torch
from compositions import SHAPES, Draw, make

from linearize.kernels import dispatch
from linearize.mixers import build, check
from linearize.mixers.update import Stream

SHAPE = SHAPES["grouped"]
LATTE = {"feature_map": {"name": "exp"}, "update": {"name": "latte"}, "normalizer": {"name": "none"}}
INLINE = {"feature_map": {"name": "identity"}, "update": {"name": "inline"}, "normalizer": {"name": "none"}}
MALA = {"feature_map": {"name": "elu"}, "update": {"name": "mala"}, "normalizer": {"name": "none"}}
MIXERS = {
    "latte": LATTE,
    "inline": INLINE,
    "inline as published": {**INLINE, "update": {"name": "inline", "averaged": False}},
    "mala": MALA,
}
mixers = pytest.mark.parametrize("name", MIXERS)


def weights_of(name, made, x, row, head, t):
    """Of a query on the t + 1 keys that it sees."""
    n, q, k = head // made.shape.group, x.q[row, t, head], x.k[row, : t + 1, head // made.shape.group]
    if name == "latte":
        chosen, spread = q.softmax(-1), k.softmax(0)
        return spread @ chosen
    if name == "mala":
        q, k = (torch.nn.functional.elu(y) + 1 for y in (q, k))
    else:
        q = q * made.shape.scaling
    scores, count = k @ q, t + 1
    scale = made.update.scale[head]
    scale = scale / count if made.update.config.averaged else scale
    assert n < made.shape.kv_heads
    base = scores / scores.sum() if name == "mala" else torch.full_like(scores, 1 / count)
    return base + scale * (scores - scores.mean())


@mixers
def test_weights_are_the_papers(name):
    made, x = make(MIXERS[name], SHAPE, torch.float64), Draw.of(SHAPE, 40, torch.float64)
    with torch.no_grad():
        out, shown = x.run(made.chunked), made.parallel(x.q, x.k, None, hidden=x.hidden, plain=x.plain)
        for row, head, t in ((0, 0, 0), (0, 3, 17), (1, 1, 39)):
            wanted = weights_of(name, made, x, row, head, t)
            torch.testing.assert_close(wanted.sum(), torch.ones((), dtype=torch.float64))
            torch.testing.assert_close(shown[row, t, head, : t + 1], wanted, atol=1e-11, rtol=1e-9)
            expected = wanted @ x.v[row, : t + 1, head // SHAPE.group]
            torch.testing.assert_close(out[row, t, head], expected, atol=1e-10, rtol=1e-9)


def loop(name, made, x, row, first, last):
    """Some tokens of one row, a document of their own, by what is carried from one to the next."""
    shape, out = (
        made.shape,
        torch.zeros(last - first, made.shape.heads, made.shape.value_dim, dtype=torch.float64),
    )
    for head in range(shape.heads):
        n, sums = head // shape.group, torch.zeros(shape.key_dim, shape.value_dim, dtype=torch.float64)
        norms, values = sums[:, 0].clone(), sums[0].clone()
        for t in range(first, last):
            q, k, v = x.q[row, t, head], x.k[row, t, n], x.v[row, t, n]
            if name == "latte":
                k = k.exp()
            elif name == "mala":
                q, k = (torch.where(y > 0, y + 1, y.exp()) for y in (q, k))
            else:
                q = q * shape.scaling
            sums, norms, values = sums + torch.outer(k, v), norms + k, values + v
            if name == "latte":
                out[t - first, head] = q.softmax(-1) @ (sums / norms[:, None])
                continue
            count, found, weight = t - first + 1, q @ sums, q @ norms
            scale = made.update.scale[head] / (count if made.update.config.averaged else 1)
            base = found / weight if name == "mala" else values / count
            out[t - first, head] = base + scale * (found - weight * values / count)
    return out


@mixers
@pytest.mark.parametrize("form", ["parallel", "chunked"])
def test_it_is_its_recurrence(name, form):
    """Every output, with documents and padding."""
    made, x = make(MIXERS[name], SHAPE, torch.float64), Draw.of(SHAPE, 60, torch.float64)
    starts, valid = torch.zeros(2, 60, dtype=torch.bool), torch.ones(2, 60, dtype=torch.bool)
    starts[0, 25], valid[1, :9] = True, False
    with torch.no_grad():
        out = x.run(getattr(made, form), starts=starts, valid=valid)
        for row, first, last in ((0, 0, 25), (0, 25, 60), (1, 9, 60)):
            expected = loop(name, made, x, row, first, last)
            torch.testing.assert_close(out[row, first:last], expected, atol=1e-10, rtol=1e-8)


def test_inline_is_softmax_to_first_order():
    made, x = build(INLINE, SHAPE).double(), Draw.of(SHAPE, 30, torch.float64)
    softmax = build({"window": {"name": "full"}}, SHAPE).double()
    errors = []
    with torch.no_grad():
        for size in (1e-2, 1e-3):
            q = x.q * size
            first = made.chunked(q, x.k, x.v, hidden=x.hidden, plain=x.plain)
            errors.append((first - softmax.chunked(q, x.k, x.v, hidden=x.hidden, plain=x.plain)).abs().max())
    assert 50 < errors[0] / errors[1] < 200


def test_latte_stays_finite_where_keys_are_far_apart():
    made = build(LATTE, SHAPE)
    x = Draw.of(SHAPE, 50, torch.float32).apply(lambda y: 80 * y)
    out = x.run(made.chunked)
    assert out.isfinite().all() and out.abs().max() <= x.v.abs().max() * 1.001


@mixers
def test_kernels_give_what_the_parts_do(name):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = 2 if device == "cuda" else 1  # the interpreter takes them one after the other
    found = {}
    for kind in ("torch", "triton"):
        made = make(MIXERS[name], SHAPE, torch.float32).to(device)
        x = Draw.of(SHAPE, 70, torch.float32, batch=rows).apply(lambda y: y.to(device).requires_grad_())
        starts = torch.zeros(rows, 70, dtype=torch.bool, device=device)
        starts[0, [3, 41]] = True
        with dispatch.kernels(kind):
            out = x.run(made.chunked, starts=starts)
            wanted = [x.q, x.k, x.v, *made.parameters()]
            found[kind] = [out, *torch.autograd.grad(out.square().sum(), wanted)]
    for one, two in zip(*found.values(), strict=True):
        scale = max(1.0, two.abs().max().item())
        torch.testing.assert_close(one, two, atol=1e-4 * scale, rtol=0)


def in_sixteen_bits(monkeypatch, name, x):
    """What the rule gives, and the gradients of q, k and v, from bfloat16 as a GPU's kernels read and round it, and in
    float64 from the same numbers."""
    found, read = [], Stream.narrow
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.float64, torch.bfloat16):
        mixer = {**MIXERS[name], "feature_map": {"name": "elu"}}
        made, given, seen = (
            make(mixer, SHAPE, dtype).to(device),
            x.apply(lambda y: y.bfloat16().to(device)),
            [],
        )
        given = given.apply(lambda y, dtype=dtype: y.to(dtype).requires_grad_())
        made.recurrent.normalizer.register_forward_hook(
            lambda *call, seen=seen: seen.append(call[2].numerator)
        )
        narrow = dtype == torch.bfloat16 and device == "cpu"  # no kernel of Triton's, and so nothing narrowed
        rounded = (
            (lambda self, *tensors, grows=False: tuple(y.bfloat16() for y in tensors)) if narrow else read
        )
        monkeypatch.setattr(Stream, "narrow", rounded)
        out = given.run(made.chunked).double()
        signs = torch.arange(out.numel(), dtype=torch.float64, device=device).cos().view_as(out)
        grads = torch.autograd.grad((out * signs).sum(), [given.q, given.k, given.v])
        found.append([y.detach().double().cpu() for y in (*seen, *grads)])
    return found


@pytest.mark.parametrize("name", ["mala", "inline"])
def test_deviations_keep_their_digits_in_sixteen_bits(name, monkeypatch):
    """Features about one: the sums themselves would leave 7 % of the deviations to rounding."""
    x = Draw.of(SHAPE, 128, torch.float64, batch=1)
    x.q, x.k = x.q / 10, x.k / 10
    wanted, found = in_sixteen_bits(monkeypatch, name, x)
    count = torch.arange(1, 129)[:, None, None]
    mean = (x.v.bfloat16().double().cumsum(1) / count).repeat_interleave(SHAPE.group, 2)
    assert (found[0] - wanted[0]).norm() < 0.01 * (wanted[0] - mean).norm()
    for which in (1, 3):
        assert (found[which] - wanted[which]).norm() < 0.01 * wanted[which].norm(), "qkv"[which - 1]


@pytest.mark.parametrize("below", [6, 8, 20])
def test_no_quotient_of_rounding_errors(below, monkeypatch):
    """Keys that are negative throughout: their weights add up to less than is lost beside those of zeros."""
    x = Draw.of(SHAPE, 70, torch.float64, batch=1)
    x.k = x.k - below
    wanted, found = in_sixteen_bits(monkeypatch, "mala", x)
    assert all(y.isfinite().all() for y in found)
    # what is left of the deviations is little, but the rest is the mean, and neither nothing nor many times the values
    assert (found[0] - wanted[0]).norm() < 0.5 * wanted[0].norm()


@pytest.mark.parametrize(
    ("mixer", "problem"),
    [
        (
            {**LATTE, "feature_map": {"name": "identity"}},
            "mixer.feature_map: 'identity' has signed features, by whose sums update 'latte' cannot divide",
        ),
        (
            {**MALA, "normalizer": {"name": "running_sum"}},
            "mixer.normalizer: update 'mala' leaves no sum of its weights to divide by",
        ),
        (
            {**LATTE, "gate": {"name": "mamba2"}},
            "mixer.gate: update 'latte' takes no gate, not a gate per head",
        ),
        (
            {**INLINE, "update": {"name": "inline", "start": True}},
            "mixer.update.start: a learned start is no token of the mean; leave it out",
        ),
    ],
)
def test_what_makes_no_sense(mixer, problem):
    found = check(mixer)
    assert any(one.replace(" ()", "").startswith(problem) for one in found), found
