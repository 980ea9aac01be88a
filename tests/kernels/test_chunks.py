"""Decays inside chunks: every pair right, down to the last digits, and every gradient."""

from __future__ import annotations

import pytest
import torch
from kernel_calls import normal, uniform

from linearize.kernels.chunks import Decay, decayed_products, decayed_values

CHUNK, GROUP, WIDTH = 8, 2, 3
readers = pytest.mark.parametrize("read_before", [False, True], ids=["after", "before"])


def pair_decays(log_decay: torch.Tensor, read_before: bool) -> torch.Tensor:
    """[C, C, X] from key s to reader t, one sum at a time."""
    chunk = len(log_decay)
    out = torch.zeros(chunk, chunk, log_decay.shape[-1], dtype=log_decay.dtype)
    for t in range(chunk):
        for s in range(t + (not read_before)):
            out[t, s] = log_decay[s + 1 : t + (not read_before)].sum(0).exp()
    return out


@readers
@pytest.mark.parametrize("chunk", [1, 2, 8, 64])
def test_products_and_values_of_every_pair(read_before, chunk):
    log_decay, q = -uniform(chunk, WIDTH), normal(chunk, GROUP, WIDTH, seed=1)
    k, weights = normal(chunk, WIDTH, seed=2), normal(chunk, GROUP, chunk, seed=3)
    decay, pairs = Decay(log_decay, read_before), pair_decays(log_decay, read_before)
    products = torch.einsum("tgf,sf,tsf->tgs", q, k, pairs).flatten(0, 1)
    torch.testing.assert_close(decayed_products(q, k, decay), products)
    values = torch.einsum("tgs,sf,tsf->tgf", weights, k, pairs)
    torch.testing.assert_close(decayed_values(weights.flatten(0, 1), k, decay), values)


@readers
def test_one_decay_a_head(read_before):
    log_decay = -uniform(CHUNK, 1)
    decay = Decay(log_decay, read_before)
    torch.testing.assert_close(decay.between, pair_decays(log_decay, read_before)[..., 0])


@readers
def test_gradients(read_before):
    leaves = [
        -uniform(2, CHUNK, WIDTH),
        normal(2, CHUNK, GROUP, WIDTH, seed=1),
        normal(2, CHUNK, WIDTH, seed=2),
    ]
    leaves.append(normal(2, CHUNK * GROUP, CHUNK, seed=3))
    log_decay, q, k, weights = (leaf.requires_grad_() for leaf in leaves)
    assert torch.autograd.gradcheck(
        lambda g, *x: decayed_products(*x, Decay(g, read_before)), (log_decay, q, k)
    )
    assert torch.autograd.gradcheck(
        lambda g, *x: decayed_values(*x, Decay(g, read_before)), (log_decay, weights, k)
    )


def test_a_weak_decay_beside_strong_ones_keeps_its_digits():
    log_decay = torch.full((64, WIDTH), -20.0)
    log_decay[40:60] = -1e-3
    ones = torch.ones(64, WIDTH)
    products = decayed_products(ones[:, None], ones, Decay(log_decay))
    expected = pair_decays(log_decay.double(), False).sum(-1)
    torch.testing.assert_close(products.double(), expected, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(3 * Decay(log_decay[:, :1]).between.double(), expected, rtol=1e-5, atol=1e-30)
