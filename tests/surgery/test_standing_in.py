"""Forwards that look at numbers, of models that have none: right, and soon done whatever the model's size."""

from __future__ import annotations

import time

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoConfig

from linearize import surgery
from linearize.surgery.standing_in import standing_in


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_the_spread_number(bias, dtype):
    with torch.device("meta"):
        layer = nn.Linear(6, 5, bias=bias, dtype=dtype)
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    with standing_in(layer), torch.no_grad():
        found = layer(x)
        wanted = x.double() @ layer.weight.double().T + (0 if layer.bias is None else layer.bias.double())
        found += 1  # memory of its own, which a family may write to
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double() - 1, wanted, atol=2e-2 if dtype == torch.bfloat16 else 1e-6, rtol=0
    )
    assert layer.weight.is_meta


def test_a_published_size_is_planned_in_seconds():
    """JetMoE has 8 billion parameters, which a plan must not multiply by in full."""
    begin = time.process_time()
    plan = surgery.plan(AutoConfig.for_model("jetmoe"), tiny.LOLCATS)
    assert len(plan.rows) == 12
    assert time.process_time() - begin < 60
