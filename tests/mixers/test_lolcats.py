"""The hybrid against an independent float64 loop written from LoLCATs' equation 7, and where it is exact."""

from __future__ import annotations

import torch

from linearize.mixers import LayerShape, build

SHAPE = LayerShape(heads=4, kv_heads=2, key_dim=8, value_dim=8, scaling=8**-0.5)
WINDOW = 5


def mixer(window: int = WINDOW):
    torch.manual_seed(0)
    made = build(
        {"feature_map": {"name": "hedgehog", "dim": 6}, "window": {"name": "sliding", "size": window}}, SHAPE
    ).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def draw(tokens: int):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(1, tokens, n, 8, generator=generator, dtype=torch.float64) for n in (4, 2, 2))


def loop(made, q, k, v):
    """y_n = (sum_window g exp(s - max s) v + sum_older phi.phi v) / (the same sums without v), one query at a time."""
    out = torch.zeros(1, q.shape[1], 4, 8, dtype=torch.float64)
    for head in range(4):
        gate = torch.sigmoid(made.combine.window_factor[head])
        wq, wk = made.feature_map.query_weight[head], made.feature_map.key_weight[head]

        def phi(x, w):
            return torch.cat([torch.softmax(x @ w, 0), torch.softmax(-(x @ w), 0)])

        for n in range(q.shape[1]):
            scores = [q[0, n, head] @ k[0, i, head // 2] * 8**-0.5 for i in range(n + 1)]
            near = range(max(0, n - WINDOW + 1), n + 1)
            top = max(scores[i] for i in near)
            weights = [
                gate * torch.exp(scores[i] - top)
                if i in near
                else phi(q[0, n, head], wq) @ phi(k[0, i, head // 2], wk)
                for i in range(n + 1)
            ]
            out[0, n, head] = sum(w * v[0, i, head // 2] for i, w in enumerate(weights)) / sum(weights)
    return out


def test_equals_the_equation():
    made = mixer()
    q, k, v = draw(23)
    torch.testing.assert_close(made.chunked(q, k, v), loop(made, q, k, v), atol=1e-12, rtol=1e-12)


def test_window_longer_than_the_text_is_softmax():
    q, k, v = draw(40)
    softmax = build({"window": {"name": "full"}}, SHAPE)
    torch.testing.assert_close(mixer(40).chunked(q, k, v), softmax.chunked(q, k, v), atol=1e-12, rtol=1e-12)


def test_branches_can_be_switched_off():
    made = mixer()
    q, k, v = draw(40)
    only_window = build({"window": {"name": "sliding", "size": WINDOW}}, SHAPE)
    made.branch_off = "linear"
    torch.testing.assert_close(made.chunked(q, k, v), only_window.chunked(q, k, v), atol=1e-12, rtol=1e-12)
    made.branch_off = "window"
    out = made.chunked(q, k, v)
    assert (out[:, :WINDOW] == 0).all(), "nothing has left the window yet"
    assert out[:, WINDOW:].abs().min(-1).values.max() > 0
