"""The closed forms of a calibration: least squares per head, ridge on gates, prototypes of keys. No random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 0.1
"""Of the mean square of what a ridge multiplies."""
RIDGE_TOGETHER = 0.001
"""The same of the system that joins all heads."""
BLOCK = 1024
"""Tokens whose products are held at once."""
ROUNDS = 8
"""Of Lloyd's algorithm."""
SAMPLED, HALVINGS, MOST = 256, 12, 8.0
"""Tokens that log-normal scales are found by, halvings of their range, and its end in standard deviations."""


def squared_error(y: Tensor, target: Tensor) -> Tensor:
    """Sum over tokens and dims of (y - target)^2: [N, H, V] twice -> [H] float64."""
    return (y - target).square().sum(2).double().sum(0)


def inner(x: Tensor, y: Tensor) -> Tensor:
    """Sum over tokens and dims of x y: [N, H, V] twice -> [H] float64."""
    return (x * y).sum(2).double().sum(0)


def scale(y: Tensor, target: Tensor) -> Tensor:
    """The factor [H] on y [N, H, V] that comes nearest the target; zero where y is."""
    size = inner(y, y)
    return torch.where(size > 0, inner(y, target) / size.clamp_min(1e-30), 0.0)


def two_scales(near: Tensor, far: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Factors a, b >= 0, [H] each, with a near + b far nearest the target; all [N, H, V].

    The unconstrained solution where it has both signs right, else the better of the two with one branch alone.
    """
    nn, ff, nf = inner(near, near), inner(far, far), inner(near, far)
    nt, ft = inner(near, target), inner(far, target)
    det = nn * ff - nf * nf
    solved = det > 1e-9 * nn * ff
    safe = torch.where(solved, det, 1.0)
    a, b = (ff * nt - nf * ft) / safe, (nn * ft - nf * nt) / safe
    inside = solved & (a >= 0) & (b >= 0)
    only_a = (nt / nn.clamp_min(1e-30)).clamp_min(0)
    only_b = (ft / ff.clamp_min(1e-30)).clamp_min(0)
    near_better = only_a * nt >= only_b * ft  # what each takes off the squared error
    zero = torch.zeros_like(a)
    return (
        torch.where(inside, a, torch.where(near_better, only_a, zero)),
        torch.where(inside, b, torch.where(near_better, zero, only_b)),
    )


def together(y: Tensor, target: Tensor, projection: Tensor, *, dims: bool) -> Tensor:
    """Factors on heads, or on every dim of every head, with which the projected output is nearest the target's.

    Heads meet in the output projection, so their errors can cancel there: one linear system for all of them, with the
    normal matrix (Y^T Y) * (O O^T), * by element, and a ridge that pulls toward one.

    Args:
        y, target: [N, H, V].
        projection: O [H V, D].
        dims: a factor for each of [H, V] instead of [H].
    """
    heads, width = y.shape[1:]
    source, wanted, weight = y.flatten(1).double(), target.flatten(1).double(), projection.double()
    metric = weight @ weight.T
    normal, right = (source.T @ source) * metric, ((source.T @ wanted) * metric).sum(1)
    if not dims:
        normal = normal.view(heads, width, heads, width).sum((1, 3))
        right = right.view(heads, width).sum(1)
    ridge = RIDGE_TOGETHER * normal.diagonal().mean() + 1e-30
    normal.diagonal().add_(ridge)
    factor = torch.linalg.solve(normal, right + ridge)
    return factor.view(heads, width) if dims else factor


def components(x: Tensor, count: int) -> Tensor:
    """The leading `count` principal directions of x [N, D], each scaled to unit variance: [D, count].

    Signs are fixed, the largest entry of a direction being positive, so that two libraries give the same.
    """
    x = x.double()
    spread = torch.cov(x.T, correction=0)
    values, vectors = torch.linalg.eigh(spread)
    values, vectors = values[-count:].flip(0), vectors[:, -count:].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    floor = values[0].clamp_min(1e-30) * 1e-9
    return vectors * largest / values.clamp_min(floor).sqrt()


def gate(y: Tensor, target: Tensor, features: Tensor) -> Tensor:
    """Ridge regression of a gate: y_v * (c_v + sum_r f_r W_rv) nearest the target, one head at a time.

    c is the least-squares factor of each dim by itself, and W then takes what is left, shrunk toward zero.

    Args:
        y, target: [N, H, V].
        features: [N, R], R = 1 at least; the first one is constant.

    Returns:
        [R, H, V]; c is part of the first feature's row.
    """
    width, heads, dims = features.shape[1], y.shape[1], y.shape[2]
    features = features.double()
    eye = torch.eye(width, dtype=torch.float64, device=y.device)
    found = torch.empty(width, heads, dims, dtype=torch.float64, device=y.device)
    for head in range(heads):
        source, wanted = y[:, head].double(), target[:, head].double()
        squares = source.square()
        factor = (source * wanted).sum(0) / squares.sum(0).clamp_min(1e-30)
        rest = source * (wanted - source * factor)
        products = torch.zeros(dims, width * width, dtype=torch.float64, device=y.device)
        for block in range(0, len(y), BLOCK):
            part = features[block : block + BLOCK]
            pairs = (part[:, :, None] * part[:, None]).flatten(1)
            products += squares[block : block + BLOCK].T @ pairs
        normal = products.view(dims, width, width)
        size = normal.diagonal(dim1=1, dim2=2).mean(1)
        normal = normal + (RIDGE * size + 1e-30)[:, None, None] * eye
        weights = torch.linalg.solve(normal, rest.T @ features)
        weights[:, 0] += factor / features[0, 0]
        found[:, head] = weights.T
    return found


def prototypes(keys: Tensor, first: Tensor, count: int) -> Tensor:
    """`count` keys that stand for all: the mean first key of a text, and centers of the rest by Lloyd's algorithm.

    Begins at keys spread evenly over the text, so there is nothing to draw. The first one is held, since a softmax
    rests on a text's first token whatever else the text holds.

    Args:
        keys: [N, K].
        first: [K].
        count: 1 or more.

    Returns:
        [count, K].
    """
    picks = torch.linspace(0, len(keys) - 1, count, device=keys.device).round().long()
    centers = torch.cat([first[None], keys[picks[1:]]])
    for _ in range(ROUNDS):
        nearest = torch.cdist(keys, centers).argmin(1)
        member = (nearest[:, None] == torch.arange(count, device=keys.device)).to(keys.dtype)
        sizes = member.sum(0)
        means = member.T @ keys / sizes.clamp_min(1)[:, None]
        centers = torch.where((sizes > 0)[:, None], means, centers)
        centers[0] = first
    return centers


def linear(x: Tensor, wanted: Tensor, weight: Tensor | None = None) -> Tensor:
    """Ridge regression without a constant: [K] with x w nearest `wanted`, by a weight on each row.

    Args:
        x: [N, K].
        wanted: [N].
        weight: [N], one each by default.
    """
    x = x.double()
    scaled = x if weight is None else x * weight.double()[:, None]
    normal = scaled.T @ x
    normal.diagonal().add_(RIDGE_TOGETHER * normal.diagonal().mean() + 1e-30)
    return torch.linalg.solve(normal, scaled.T @ wanted.double()).to(wanted.dtype)


def log_normal(q: Tensor, k: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Factors on q and k under which a sum of K exponentials spreads as softmax's weights do, of all heads at once.

    Linear Log-Normal attention (Nahshan et al. 2023, arXiv 2311.13541, section 4) matches the variance of log weights:
    that of softmax is the variance of the scores; that of log sum_i exp(a q_i + b k_i), with a sd(q) = b sd(k) = u,
    grows with u. The paper fits a line to it, here u is found by halving, on tokens spread evenly.

    Args:
        q, k: [N, H, K], of each head its own key head.
        scaling: on q.k in the teacher.

    Returns:
        [H] each, float64.
    """
    q, k = (x[:: -(-len(x) // SAMPLED)].double().transpose(0, 1) for x in (q, k))
    of_q, of_k = (x.std((1, 2)).clamp_min(1e-6) for x in (q, k))
    wanted = (scaling * q @ k.mT).std((1, 2))
    q, k = q / of_q[:, None, None], k / of_k[:, None, None]
    low, high = torch.zeros_like(wanted), torch.full_like(wanted, MOST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        wide_q, wide_k = (middle[:, None, None] * x for x in (q, k))
        top_q, top_k = wide_q.amax(2, keepdim=True), wide_k.amax(2, keepdim=True)
        sums = (wide_q - top_q).exp() @ (wide_k - top_k).exp().mT
        spread = (sums.clamp_min(1e-300).log() + top_q + top_k.mT).std((1, 2))
        low, high = torch.where(spread < wanted, middle, low), torch.where(spread < wanted, high, middle)
    return low / of_q, low / of_k
