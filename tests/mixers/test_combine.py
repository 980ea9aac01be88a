"""Rules that join the branches, each against its equation written out in float64."""

from __future__ import annotations

import pytest
import torch

from linearize.errors import LinearizeError
from linearize.mixers import LayerShape, build, check
from linearize.mixers.base import Partial
from linearize.mixers.combine import COMBINES

SHAPE = LayerShape(heads=3, kv_heads=3, key_dim=4, value_dim=5, scaling=0.5, model_dim=7)


def partial(seed: int, normalizer: bool = True) -> Partial:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.rand(2, 6, 3, *size, generator=generator, dtype=torch.float64)

    return Partial(draw(5), 0.5 + draw() if normalizer else None, draw() if seed == 0 else None)


def rule(name: str, **options):
    cls = COMBINES.get(name)
    made = cls(cls.Config(**options), SHAPE).double()
    generator = torch.Generator().manual_seed(4)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return made


def mean(branch: Partial) -> torch.Tensor:
    return branch.numerator / branch.denominator[..., None]


def test_weighted():
    near, far = partial(0), partial(1)
    out = rule("weighted", window=0.3, recurrent=0.9)(near, far)
    torch.testing.assert_close(out, 0.3 * mean(near) + 0.9 * mean(far), atol=1e-12, rtol=1e-12)


def test_liger_takes_the_recurrent_output_as_it_is():
    near, far = partial(0), partial(1, normalizer=False)
    out = rule("weighted")(near, far)
    torch.testing.assert_close(out, 0.5 * mean(near) + 0.5 * far.numerator, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(rule("sum")(near, far), mean(near) + far.numerator, atol=1e-12, rtol=1e-12)


def test_sum():
    near, far = partial(0), partial(1)
    torch.testing.assert_close(rule("sum")(near, far), mean(near) + mean(far), atol=1e-12, rtol=1e-12)


def test_sigmoid_per_head():
    made, near, far = rule("sigmoid"), partial(0), partial(1)
    out = made(near, far)
    for head in range(3):
        share = 1 / (1 + torch.exp(-made.window_factor[head]))
        expected = share * mean(near)[:, :, head] + (1 - share) * mean(far)[:, :, head]
        torch.testing.assert_close(out[:, :, head], expected, atol=1e-12, rtol=1e-12)


def test_sigmoid_per_token():
    made, near, far = rule("sigmoid", per="token"), partial(0), partial(1)
    assert made.uses_hidden
    hidden = torch.randn(2, 6, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    out = made(near, far, hidden)
    for head in range(3):
        logit = (hidden * made.token_weight[head]).sum(-1) + made.window_factor[head]
        share = (1 / (1 + torch.exp(-logit)))[..., None]
        expected = share * mean(near)[:, :, head] + (1 - share) * mean(far)[:, :, head]
        torch.testing.assert_close(out[:, :, head], expected, atol=1e-12, rtol=1e-12)


def test_sigmoid_starts_alike_for_every_token():
    cls = COMBINES.get("sigmoid")
    near, far = partial(0), partial(1)
    per_token = cls(cls.Config(per="token", window_weight_init=0.8), SHAPE)
    out = per_token(near, far, torch.ones(2, 6, 7))
    torch.testing.assert_close(out, 0.8 * mean(near) + 0.2 * mean(far), atol=1e-6, rtol=1e-6)
    with pytest.raises(LinearizeError, match="use per: head"):
        cls(cls.Config(per="token"), LayerShape(3, 3, 4, 5, 0.5))


@pytest.mark.parametrize("name", ["weighted", "sigmoid"])
def test_a_branch_that_saw_nothing_leaves_its_weight_to_the_other(name):
    near, far = partial(0), partial(1)
    far.numerator[:, :2], far.denominator[:, :2] = 0.0, 0.0
    near.numerator[:, 1:3], near.denominator[:, 1:3] = 0.0, 0.0
    out = rule(name)(near, far)
    torch.testing.assert_close(out[:, 0], mean(near)[:, 0], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(out[:, 2], mean(far)[:, 2], atol=1e-12, rtol=1e-12)
    assert (out[:, 1] == 0).all(), "padding sees nothing at all"


@pytest.mark.parametrize("name", ["weighted", "sigmoid", "sum"])
def test_window_longer_than_the_text_is_softmax(name):
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, 30, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(1, 30, 3, 5, generator=generator, dtype=torch.float64)
    mixer = {
        "feature_map": {"name": "hedgehog", "dim": 4},
        "window": {"name": "sliding", "size": 30},
        "combine": {"name": name},
    }
    softmax = build({"window": {"name": "full"}}, SHAPE)
    out = build(mixer, SHAPE).double().chunked(q, k, v)
    torch.testing.assert_close(out, softmax.chunked(q, k, v), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "weighted", "window": 0}, "combine.window: must be above 0"),
        ({"name": "sigmoid", "per": "row"}, "'row' is not one of head, token"),
        ({"name": "sigmoid", "window_weight_init": 1.0}, "must be above 0 and below 1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    mixer = {"feature_map": {"name": "hedgehog"}, "window": {"name": "sliding"}, "combine": options}
    assert message in "\n".join(check(mixer))
