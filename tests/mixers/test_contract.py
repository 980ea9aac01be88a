"""The contract of every mixer: parallel, chunked and one-token forms are one function.

Everything registered is found by itself: the product of all feature maps, windows, update rules and combinations,
at small sizes, plus the options that change shapes.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from linearize.mixers import PARTS, LayerShape, build, check

SHAPES = {
    "grouped": LayerShape(heads=4, kv_heads=2, key_dim=8, value_dim=6, scaling=8**-0.5),
    "capped": LayerShape(
        heads=3, kv_heads=1, key_dim=8, value_dim=8, scaling=0.3, softcap=4.0, sliding_window=11
    ),
}
SMALL = {"dim": 8, "size": 5}
VARIANTS = [
    {
        "feature_map": {"name": "hedgehog", "dim": 5, "per": "kv_head"},
        "window": {"name": "sliding", "size": 5},
    },
    {"feature_map": {"name": "hedgehog", "dim": 8, "tied": True, "space": "half"}},
    {
        "feature_map": {"name": "hedgehog", "dim": 8, "activation": "exp"},
        "window": {"name": "sliding", "size": 1},
    },
    {
        "feature_map": {"name": "hedgehog", "dim": 8},
        "window": {"name": "sliding", "size": 20},
        "combine": {"name": "shared_normalizer", "complement": True, "stabilized": True},
    },
]


def registered() -> list[dict]:
    """Every combination of registered parts that a recipe may write."""
    choices = []
    for part, (registry, _) in PARTS.items():
        names = [*registry.names(), *([] if "none" in registry else ["none"])]
        choices.append([(part, {"name": name, **_small(registry, name)}) for name in names])
    mixers = [dict(parts) for parts in itertools.product(*choices)]
    return [mixer for mixer in mixers if not check(mixer) and not _idle(mixer)] + VARIANTS


def _idle(mixer: dict) -> bool:
    """Whether a part is named that this composition does not use: the same mixer stands in the list without it."""
    made = build(mixer, SHAPES["grouped"])
    return any(
        mixer[part]["name"] != "none" and getattr(made, part) is None for part in ("update", "combine")
    )


def _small(registry, name: str) -> dict:
    fields = registry.get(name).Config.__dataclass_fields__ if name in registry else {}
    return {key: value for key, value in SMALL.items() if key in fields}


def label(mixer: dict) -> str:
    return "-".join(
        "_".join(str(value) for value in options.values())
        for options in mixer.values()
        if options["name"] != "none"
    )


def inputs(shape: LayerShape, tokens: int, dtype: torch.dtype, batch: int = 2, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, width: int) -> torch.Tensor:
        return torch.randn(batch, tokens, heads, width, generator=generator, dtype=torch.float64).to(dtype)

    q, k = 1.5 * draw(shape.heads, shape.key_dim), draw(shape.kv_heads, shape.key_dim)
    return q, k, draw(shape.kv_heads, shape.value_dim)


def make(mixer: dict, shape: LayerShape, dtype: torch.dtype):
    torch.manual_seed(0)
    made = build(mixer, shape)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made.to(dtype)


mixers = pytest.mark.parametrize("mixer", registered(), ids=label)
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
precisions = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["f32", "f64"]
)


def test_parts_are_found():
    names = {label(mixer) for mixer in registered()}
    assert "full" in {name.split("-")[0] for name in names}
    assert any("hedgehog" in name and "sliding" in name for name in names)


@mixers
@shapes
@precisions
@pytest.mark.parametrize("tokens", [1, 7, 64, 131])
def test_chunked_equals_parallel(mixer, shape, dtype, tolerance, tokens):
    made = make(mixer, shape, dtype)
    q, k, v = inputs(shape, tokens, dtype)
    expected = made.parallel(q, k, v)
    assert expected.shape == (2, tokens, shape.heads, shape.value_dim)
    assert expected.dtype == dtype
    torch.testing.assert_close(made.chunked(q, k, v), expected, atol=tolerance, rtol=tolerance)


@mixers
@shapes
def test_steps_equal_parallel(mixer, shape):
    made = make(mixer, shape, torch.float64)
    q, k, v = inputs(shape, 77, torch.float64)
    state = made.initial_state(2, torch.float64, q.device)
    before = {name: state[name].data_ptr() for name in state}
    steps = [made.step(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], state=state) for t in range(77)]
    torch.testing.assert_close(torch.cat(steps, 1), made.parallel(q, k, v), atol=1e-10, rtol=1e-10)
    if mixer.get("window", {}).get("name") != "full":
        assert {name: state[name].data_ptr() for name in state} == before, "decoding must write in place"


@mixers
@precisions
@pytest.mark.parametrize("cuts", [(70, 100), (3, 4), (64, 128), (1, 130)])
def test_state_carries_across_calls(mixer, dtype, tolerance, cuts):
    """Prefill, single tokens, and a second prefill, with left padding in the first call."""
    shape = SHAPES["grouped"]
    made = make(mixer, shape, dtype)
    q, k, v = inputs(shape, 131, dtype)
    valid = torch.ones(2, 131, dtype=torch.bool)
    valid[0, : cuts[0] // 2] = False
    expected = made.parallel(q, k, v, valid=valid)
    state = made.initial_state(2, dtype, q.device)
    first, second = cuts
    with torch.no_grad():
        parts = [made.chunked(q[:, :first], k[:, :first], v[:, :first], valid=valid[:, :first], state=state)]
        parts += [
            made.step(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], state=state)
            for t in range(first, second)
        ]
        parts.append(made.chunked(q[:, second:], k[:, second:], v[:, second:], state=state))
    torch.testing.assert_close(torch.cat(parts, 1)[valid], expected[valid], atol=tolerance, rtol=tolerance)


@mixers
@shapes
def test_left_padding_changes_nothing(mixer, shape):
    made = make(mixer, shape, torch.float64)
    q, k, v = inputs(shape, 90, torch.float64, batch=1)
    noise = inputs(shape, 13, torch.float64, batch=1, seed=9)
    padded = [torch.cat([a, b], 1) for a, b in zip(noise, (q, k, v), strict=True)]
    valid = torch.ones(1, 103, dtype=torch.bool)
    valid[:, :13] = False
    for form in (made.parallel, made.chunked):
        out = form(*padded, valid=valid)
        assert out.isfinite().all()
        torch.testing.assert_close(out[:, 13:], form(q, k, v), atol=1e-10, rtol=1e-10)


@mixers
@shapes
def test_packed_documents_do_not_see_each_other(mixer, shape):
    made = make(mixer, shape, torch.float64)
    lengths = [3, 61, 2, 40, 70]
    q, k, v = inputs(shape, sum(lengths), torch.float64, batch=1)
    starts = torch.zeros(1, sum(lengths), dtype=torch.bool)
    bounds = [0, *itertools.accumulate(lengths)]
    starts[0, bounds[1:-1]] = True
    alone = torch.cat(
        [made.parallel(q[:, a:b], k[:, a:b], v[:, a:b]) for a, b in itertools.pairwise(bounds)], 1
    )
    state = made.initial_state(1, torch.float64, q.device)
    torch.testing.assert_close(made.parallel(q, k, v, starts=starts), alone, atol=1e-10, rtol=1e-10)
    with torch.no_grad():
        packed = made.chunked(q, k, v, starts=starts, state=state)
    torch.testing.assert_close(packed, alone, atol=1e-10, rtol=1e-10)
    # the carried state is that of the last document alone
    more = inputs(shape, 9, torch.float64, batch=1, seed=5)
    last = [torch.cat([a[:, bounds[-2] :], b], 1) for a, b in zip((q, k, v), more, strict=True)]
    steps = [made.step(*(x[:, t : t + 1] for x in more), state=state) for t in range(9)]
    torch.testing.assert_close(torch.cat(steps, 1), made.parallel(*last)[:, -9:], atol=1e-10, rtol=1e-10)


@mixers
@shapes
def test_gradients_are_equal_and_finite(mixer, shape):
    made = make(mixer, shape, torch.float64)
    valid = torch.ones(2, 75, dtype=torch.bool)
    valid[0, :10] = False
    starts = torch.zeros(2, 75, dtype=torch.bool)
    starts[1, 33] = True
    gradients = []
    for form in (made.parallel, made.chunked):
        leaves = [x.requires_grad_() for x in inputs(shape, 75, torch.float64)]
        wanted = [*leaves, *made.parameters()]
        out = form(*leaves, valid=valid, starts=starts)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        gradients.append(torch.autograd.grad((out * weight).sum(), wanted))
    for dense, chunked in zip(*gradients, strict=True):
        assert dense.isfinite().all()
        assert dense.abs().max() > 0
        torch.testing.assert_close(chunked, dense, atol=1e-9, rtol=1e-9)


@mixers
def test_causal(mixer):
    shape = SHAPES["grouped"]
    made = make(mixer, shape, torch.float64)
    q, k, v = inputs(shape, 80, torch.float64)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, 50:] += 1.0
    out, other = made.chunked(q, k, v), made.chunked(*changed)
    torch.testing.assert_close(out[:, :50], other[:, :50], atol=1e-12, rtol=0)
    assert (out[:, 50:] - other[:, 50:]).abs().max() > 1e-3


@mixers
def test_weights_reproduce_the_output(mixer):
    """`parallel` without values gives weights that reproduce the output and sum to what the mixer says."""
    shape = SHAPES["grouped"]
    made = make(mixer, shape, torch.float64)
    q, k, v = inputs(shape, 30, torch.float64)
    weights = made.parallel(q, k, None, rows=slice(10, 25))
    total = weights.sum(-1)
    if mixer.get("window", {}).get("sinks") == "learned":
        assert (total < 1).all(), "the sink takes weight and gives no value"
    else:
        whole = 2.0 if made.combine is not None and mixer["combine"]["name"] == "sum" else 1.0
        torch.testing.assert_close(total, torch.full_like(total, whole))
    wide = v.repeat_interleave(shape.group, dim=2)
    torch.testing.assert_close(
        torch.einsum("brhs,bshv->brhv", weights, wide), made.parallel(q, k, v)[:, 10:25]
    )


@mixers
def test_beams_reorder_and_repeat(mixer):
    shape = SHAPES["grouped"]
    made = make(mixer, shape, torch.float64)
    q, k, v = inputs(shape, 21, torch.float64)
    state = made.initial_state(2, torch.float64, q.device)
    with torch.no_grad():
        made.chunked(q[:, :20], k[:, :20], v[:, :20], state=state)
    order = torch.tensor([1, 0, 1])
    state.select(order)
    out = made.step(q[order, 20:], k[order, 20:], v[order, 20:], state=state)
    torch.testing.assert_close(out, made.parallel(q, k, v)[order, 20:], atol=1e-10, rtol=1e-10)
    state.repeat(2)
    assert state.batch == 6


@mixers
def test_bytes_and_parameters_are_counted(mixer):
    made = build(mixer, SHAPES["grouped"])
    assert made.added_parameters == sum(p.numel() for p in made.parameters())
    assert (
        made.state_bytes(3, torch.float32) == made.initial_state(3, torch.float32, torch.device("cpu")).bytes
    )


@pytest.mark.parametrize(
    "mixer", [m for m in registered() if m.get("window", {}).get("name") != "full"], ids=label
)
def test_long_bfloat16_decode_stays_close(mixer):
    """3,000 tokens in bfloat16 against float32: a bfloat16 normalizer would be off by half here."""
    shape = SHAPES["grouped"]
    made = make(mixer, shape, torch.float32)
    q, k, v = inputs(shape, 3000, torch.bfloat16, batch=1)
    state, exact = (made.initial_state(1, dtype, q.device) for dtype in (torch.bfloat16, torch.float32))
    with torch.no_grad():
        made.chunked(q[:, :-50], k[:, :-50], v[:, :-50], state=state)
        reference = made.chunked(q.float(), k.float(), v.float(), state=exact)[:, -50:]
        out = torch.cat(
            [made.step(*(x[:, t : t + 1] for x in (q, k, v)), state=state) for t in range(2950, 3000)], 1
        )
    assert (out - reference).norm() < 0.02 * reference.norm()
