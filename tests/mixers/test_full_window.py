"""Softmax over everything: by a kernel, with scores that grow with the length, in a ring of fixed size."""

from __future__ import annotations

import math

import pytest
import torch
from compositions import Draw

from linearize.decode.bounded import bounded
from linearize.kernels import dispatch
from linearize.mixers import LayerShape, build, check

SHAPES = {
    "whole": LayerShape(heads=4, kv_heads=2, key_dim=16, value_dim=16, scaling=0.25, model_dim=10),
    "sliding": LayerShape(
        heads=2,
        kv_heads=1,
        key_dim=16,
        value_dim=16,
        scaling=0.3,
        softcap=4.0,
        sliding_window=11,
        model_dim=10,
    ),
}
MIXERS = {
    "teacher's": {"window": {"name": "full"}},
    "no rotation": {
        "window": {"name": "full", "log_base": 5.0},
        "position": {"name": "rope", "window": False},
    },
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
mixers = pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)


def masks(tokens: int) -> dict[str, torch.Tensor]:
    """Padding in front of the second row, and documents."""
    valid, starts = torch.ones(2, tokens, dtype=torch.bool), torch.zeros(2, tokens, dtype=torch.bool)
    valid[1, :6] = False
    starts[0, 9] = starts[0, 30] = starts[1, 20] = True
    return {"valid": valid, "starts": starts}


@pytest.mark.skipif(not dispatch.interpreted(), reason="needs TRITON_INTERPRET=1")
@shapes
@mixers
@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_computes_the_definition(mixer, shape, masked):
    made = build(mixer, shape)
    given = masks(41) if masked else {}
    exact = Draw.of(shape, 41, torch.float64).apply(lambda x: x.requires_grad_())
    inputs = Draw.of(shape, 41, torch.float32).apply(lambda x: x.requires_grad_())
    sink = torch.linspace(-1, 1, shape.heads)
    expected = exact.run(made.parallel, **given, sink=sink.double())
    with dispatch.kernels("triton"):
        out = inputs.run(made.chunked, **given, sink=sink)
    real = given.get("valid", torch.ones(2, 41, dtype=torch.bool))
    torch.testing.assert_close(out[real].double(), expected[real], atol=2e-5, rtol=0)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)) * real[..., None, None]
    found = torch.autograd.grad((out * weight).sum(), inputs.tensors, allow_unused=True)
    true = torch.autograd.grad((expected * weight).sum(), exact.tensors, allow_unused=True)
    for one, two in zip(found, true, strict=True):
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            torch.testing.assert_close(one.double(), two, atol=1e-4, rtol=0)


@pytest.mark.skipif(not dispatch.interpreted(), reason="needs TRITON_INTERPRET=1")
@shapes
@mixers
def test_what_a_prompt_leaves_behind_is_the_same(mixer, shape):
    """A prompt by the kernel, then pieces and tokens on its state."""
    made = build(mixer, shape)
    x = Draw.of(shape, 50, torch.float32)
    valid = masks(50)["valid"]
    expected = x.run(made.parallel, valid=valid)
    for choice in ("triton", "torch"):
        state = made.initial_state(2, torch.float32, x.q.device)
        with torch.no_grad(), dispatch.kernels(choice):
            parts = [x[:33].run(made.chunked, valid=valid[:, :33], state=state)]
            parts += [x[33:40].run(made.chunked, state=state)]
            parts += [x[t : t + 1].run(made.step, state=state) for t in range(40, 50)]
        torch.testing.assert_close(torch.cat(parts, 1)[valid], expected[valid], atol=2e-5, rtol=0)


@shapes
@mixers
def test_a_ring_as_long_as_the_text(mixer, shape):
    """What decoding in one graph holds in its place: it never moves."""
    made = build(mixer, shape)
    ring = bounded(made, 50)
    assert not made.has_fixed_state and ring.has_fixed_state
    x = Draw.of(shape, 50, torch.float64)
    valid = masks(50)["valid"]
    expected = x.run(made.parallel, valid=valid)
    state = ring.initial_state(2, torch.float64, x.q.device)
    where = {name: state[name].data_ptr() for name in state}
    with torch.no_grad():
        parts = [x[:31].run(ring.chunked, valid=valid[:, :31], state=state)]
        parts += [x[t : t + 1].run(ring.step, state=state) for t in range(31, 50)]
    torch.testing.assert_close(torch.cat(parts, 1)[valid], expected[valid], atol=1e-10, rtol=0)
    assert where == {name: state[name].data_ptr() for name in state}
    linear = build({"feature_map": {"name": "hedgehog", "dim": 8}}, shape)
    assert bounded(linear, 50) is linear


def test_scores_grow_with_the_logarithm_of_the_length():
    """Against a loop: the t-th query, from 0, is multiplied by log_a(t + a)."""
    shape = SHAPES["whole"]
    x = Draw.of(shape, 12, torch.float64)
    out = x.run(build({"window": {"name": "full", "log_base": 362}}, shape).parallel)
    for t in range(12):
        for head in range(4):
            q = x.q[0, t, head] * math.log(t + 362) / math.log(362)
            weights = (x.k[0, : t + 1, head // 2] @ q * shape.scaling).softmax(0)
            torch.testing.assert_close(
                out[0, t, head], weights @ x.v[0, : t + 1, head // 2], atol=1e-10, rtol=0
            )


@pytest.mark.parametrize("base", [0.5, 1])
def test_a_base_without_a_logarithm(base):
    wrong = check({"window": {"name": "full", "log_base": base}})
    assert wrong == [f"mixer.window.log_base: must be 0 (off) or above 1, got {base:g}"]
