"""Closed forms against answers that are known beforehand."""

from __future__ import annotations

import pytest
import torch

from linearize.mixers import fits

TOKENS, HEADS, WIDTH = 300, 3, 4


def drawn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def near() -> torch.Tensor:
    return drawn(TOKENS, HEADS, WIDTH, seed=1)


@pytest.fixture
def far() -> torch.Tensor:
    return drawn(TOKENS, HEADS, WIDTH, seed=2)


def test_scale_is_found_and_is_zero_for_nothing(near):
    wanted = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    assert torch.allclose(fits.scale(near, near * wanted[:, None]), wanted)
    assert torch.equal(fits.scale(torch.zeros_like(near), near), torch.zeros(HEADS, dtype=torch.float64))


def test_two_scales_are_found(near, far):
    a, b = torch.tensor([0.7, 0.0, 2.0]).double(), torch.tensor([0.2, 1.5, 0.0]).double()
    found = fits.two_scales(near, far, near * a[:, None] + far * b[:, None])
    assert torch.allclose(found[0], a, atol=1e-9) and torch.allclose(found[1], b, atol=1e-9)


def test_a_factor_below_zero_leaves_the_better_branch_alone(near, far):
    a, b = fits.two_scales(near, far, near - 0.1 * far)
    assert torch.equal(b, torch.zeros_like(b))
    assert torch.allclose(a, fits.scale(near, near - 0.1 * far))
    a, b = fits.two_scales(near, far, far - 0.1 * near)
    assert torch.equal(a, torch.zeros_like(a)) and (b > 0.9).all()


def test_two_equal_branches_are_no_error(near):
    a, b = fits.two_scales(near, near, near)
    assert torch.allclose(a + b, torch.ones_like(a))


def test_a_gate_from_the_features_is_found(near):
    features = drawn(TOKENS, 3, seed=3)
    features[:, 0] = 0.5
    true = drawn(3, HEADS, WIDTH, seed=4)
    target = near * torch.einsum("nr,rhv->nhv", features, true)
    found = fits.gate(near, target, features)
    error = fits.squared_error(near * torch.einsum("nr,rhv->nhv", features, found), target).sum()
    held = (fits.RIDGE / (1 + fits.RIDGE)) ** 2  # by the ridge, at most
    assert error < held * fits.inner(target, target).sum()
    constant = near * 0.01
    assert torch.allclose(fits.gate(near, constant, features)[0], torch.full((HEADS, WIDTH), 0.02).double())


def test_components_have_unit_variance_and_no_correlation():
    x = drawn(TOKENS, 6, seed=5) @ drawn(6, 6, seed=6)
    found = fits.components(x, 3)
    assert torch.allclose(torch.cov((x @ found).T, correction=0), torch.eye(3).double(), atol=1e-9)
    assert torch.equal(found, fits.components(x, 3))


def test_prototypes_are_the_clusters_and_hold_the_first_key():
    centers = torch.tensor([[9.0, 0.0], [0.0, 9.0], [-9.0, -9.0]])
    keys = centers.repeat_interleave(50, 0) + 0.1 * drawn(150, 2, seed=7).float()
    first = torch.tensor([30.0, 30.0])
    found = fits.prototypes(keys, first, 4)
    assert torch.equal(found[0], first)
    assert all((found[1:] - center).norm(dim=1).min() < 0.1 for center in centers)
    assert torch.equal(found, fits.prototypes(keys, first, 4))


@pytest.mark.parametrize("size", [0.3, 1.0, 3.0])
def test_log_normal_scales_give_the_spread_of_softmax(size):
    q, k = size * drawn(256, 64, seed=8), drawn(256, 64, seed=9)
    scaling = 64**-0.5
    # beside another head, whose factors are its own
    pairs = [torch.stack([x, 2 * x.flip(0)], 1) for x in (q, k)]
    (a, other), (b, _) = (x.tolist() for x in fits.log_normal(*pairs, scaling))
    assert other != pytest.approx(a, rel=0.1)
    weights = ((a * q).exp() @ (b * k).exp().T).log()
    assert float(weights.std()) == pytest.approx(float((scaling * q @ k.T).std()), rel=0.01)
    assert a * float(q.std()) == pytest.approx(b * float(k.std()))


@pytest.mark.parametrize("dims", [True, False])
def test_factors_of_all_heads_are_found_behind_the_projection(near, dims):
    projection = drawn(HEADS * WIDTH, 5, seed=10)
    wanted = 1 + 0.3 * drawn(HEADS, WIDTH if dims else 1, seed=11)
    found = fits.together(near, near * wanted, projection, dims=dims)
    made = near * (found if dims else found[:, None])
    left = ((made - near * wanted).flatten(1) @ projection).square().sum()
    assert left < 1e-3 * ((near * (1 - wanted)).flatten(1) @ projection).square().sum()
