"""A window that the device says is off: outputs and gradients of the mixer without it, and of the one with it else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from linearize.kernels import dispatch
from linearize.mixers import LayerShape, Mixer, build, compiled
from linearize.mixers.combine import COMBINES

SHAPE = LayerShape(heads=2, kv_heads=1, key_dim=16, value_dim=16, scaling=0.25, model_dim=10)
SLIDING, TERRACED = {"name": "sliding", "size": 16}, {"name": "terraced", "size": 8}
MAP = {"name": "hedgehog", "dim": 16}
MIXERS: dict[str, dict[str, Any]] = {
    **{
        f"{rule}, {name}": {"feature_map": MAP, "window": window, "combine": {"name": rule}}
        for rule in COMBINES.names()
        for name, window in {
            "every key": {**SLIDING, "overlap": True, "first": 2},
            "older keys": SLIDING,
            "blocks": TERRACED,
        }.items()
    },
    "shares that add up to one": {
        "feature_map": MAP, "window": SLIDING, "combine": {"name": "shared_normalizer", "complement": True},
    },
    "a learned sink": {"feature_map": MAP, "window": {**SLIDING, "sinks": "learned"}},
    "one scale": {
        "feature_map": MAP, "window": TERRACED, "combine": {"name": "shared_normalizer", "stabilized": True},
    },
    "a delta rule": {
        "feature_map": {"name": "identity", "l2_normalize": True}, "gate": {"name": "mamba2"},
        "update": {"name": "delta"}, "normalizer": {"name": "none"}, "window": {**SLIDING, "overlap": True},
        "combine": {"name": "sigmoid", "per": "token"}, "output": {"name": "gate", "rank": 3},
    },
}  # fmt: skip
TOKENS, FIRST = 48, 24
"""Of the text, and the first that sees an older key in every window."""


def made(mixer: dict[str, Any]) -> Mixer:
    found = build(mixer, SHAPE)
    torch.manual_seed(0)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return found


def found(mixer: Mixer, kernels: str, form: str = "chunked") -> dict[str, Tensor]:
    """Output and gradients, over queries that see something without the window."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"q": (2, 16), "k": (1, 16), "v": (1, 16), "hidden": (10,)}
    given = {
        name: torch.randn(1, TOKENS, *size, generator=generator).requires_grad_()
        for name, size in sizes.items()
    }
    with dispatch.kernels(kernels):
        out = getattr(mixer, form)(**given)[:, FIRST:]
    weight = torch.randn(out.shape, generator=generator)
    named = {**given, **dict(mixer.named_parameters())}
    gradients = torch.autograd.grad((out * weight).sum(), list(named.values()), allow_unused=True)
    zeros = (torch.zeros_like(x) if g is None else g for x, g in zip(named.values(), gradients, strict=True))
    return {"out": out.detach(), **dict(zip(named, zeros, strict=True))}


def held_equal(mixer: Mixer, kernels: str, tolerance: float, form: str = "chunked") -> None:
    for off in (False, True):
        mixer.without_window, mixer.branch_off = None, "window" if off else None
        expected = found(mixer, kernels, form)
        mixer.without_window, mixer.branch_off = torch.tensor(off), None
        for name, value in found(mixer, kernels, form).items():
            torch.testing.assert_close(
                value, expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
        if off:
            learned = {name: g for name, g in expected.items() if name.startswith(("window.", "combine."))}
            assert all(not g.any() for g in learned.values())


@pytest.mark.parametrize("form", ["chunked", "parallel"])
@pytest.mark.parametrize("name", MIXERS)
def test_in_torch(name: str, form: str) -> None:
    held_equal(made(MIXERS[name]), "torch", 1e-5, form)


@pytest.mark.skipif(not dispatch.interpreted(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    "name",
    [
        "shares that add up to one",
        pytest.param("a learned sink", marks=pytest.mark.slow),
        pytest.param("shared_normalizer, blocks", marks=pytest.mark.slow),
    ],
)
def test_in_the_one_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which computes branches and shares together, and has no window to leave out."""
    monkeypatch.setenv(compiled.VARIABLE, "never")
    mixer = made(MIXERS[name])
    assert mixer.fused is not None
    held_equal(mixer, "triton", 1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not dispatch.interpreted(), reason="needs TRITON_INTERPRET=1")
def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for all layers and draws."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    monkeypatch.setattr(compiled, "_made", {})
    monkeypatch.setenv(compiled.VARIABLE, "always")
    drawn = torch.tensor([False, True]).unbind()
    torch._dynamo.utils.counters.clear()
    for flag in drawn:
        mixer = made(MIXERS["a delta rule"])
        mixer.without_window = flag
        given = found(mixer, "triton")
        monkeypatch.setenv(compiled.VARIABLE, "never")
        expected = found(mixer, "triton")
        monkeypatch.setenv(compiled.VARIABLE, "always")
        for name, value in given.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)
    (one,) = compiled._made.values()
    assert not one.failed and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
