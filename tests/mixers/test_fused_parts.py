"""The kernel of a whole composition is taken where it computes every part: another of its kind is another function."""

from __future__ import annotations

import pytest
import torch
from compositions import Draw, make
from rounding import close

from linearize.kernels import dispatch
from linearize.mixers import LayerShape, build, check
from linearize.mixers.normalizer import NORMALIZERS

SHAPE = LayerShape(heads=2, kv_heads=2, key_dim=16, value_dim=16, scaling=0.25, model_dim=10)
HEDGEHOG = {"feature_map": {"name": "hedgehog", "dim": 16}}


def test_the_composition_itself_is_one_kernel():
    assert build(HEDGEHOG, SHAPE).fused is not None


@pytest.mark.parametrize("name", [name for name in NORMALIZERS.names() if name != "running_sum"])
def test_other_normalizers_are_computed(name):
    mixer = {**HEDGEHOG, "normalizer": {"name": name}}
    assert check(mixer) == []
    made = make(mixer, SHAPE, torch.float32)
    assert made.fused is None
    x = Draw.of(SHAPE, 9, torch.float32)
    expected = x.run(made.parallel)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with dispatch.kernels("triton"), torch.no_grad():
        found = x.apply(lambda part: part.to(device)).run(made.to(device).chunked).cpu()
    close(found, expected, 1e-3 if device == "cuda" else 1e-4)
