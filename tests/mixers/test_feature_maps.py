"""Every feature map against a float64 formula written from its paper, and what each promises."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from compositions import Draw

import linearize
from linearize import surgery
from linearize.errors import LinearizeError
from linearize.mixers import LayerShape, build, check
from linearize.mixers.base import positions
from linearize.mixers.feature_map import FEATURE_MAPS
from linearize.mixers.statistics import Statistics

SHAPE = LayerShape(heads=4, kv_heads=2, key_dim=8, value_dim=8, scaling=0.3)
POSITION = torch.tensor([[0, 1, 2, 3, 4], [3, 4, 5, 0, 1]])
SHARED = ["codes", "cosformer", "elu", "exp", "focused", "identity", "performer", "relu", "softmax_dim"]
LEARNED = ["hedgehog", "t2r", "taylor"]


def made(name: str, shape: LayerShape = SHAPE, **options):
    cls = FEATURE_MAPS.get(name)
    return cls(cls.Config(**options), shape).double()


def heads(count: int, width: int = 8, size: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(2, 5, count, width, generator=generator, dtype=torch.float64)


def products(feature_map, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """phi(q).phi(k) [B, H, T, S], key heads repeated to the queries'."""
    phi_q, phi_k = feature_map.query(q, POSITION), feature_map.key(k, POSITION)
    return torch.einsum("bthf,bshf->bhts", phi_q, phi_k.repeat_interleave(4 // phi_k.shape[2], 2))


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q.k [B, H, T, S]."""
    return torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(2, 2))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


def test_all_maps_are_here():
    assert sorted(SHARED + LEARNED) == FEATURE_MAPS.names()


@pytest.mark.parametrize("name", SHARED + LEARNED)
def test_its_value_at_zero(name):
    """For what is taken off keys and added back, any number would do; only this one leaves digits to short keys."""
    feature_map = made(name)
    if feature_map.at_zero:
        features = feature_map.key(torch.zeros(2, 5, 2, 8, dtype=torch.float64), POSITION)
        close(features, torch.full_like(features, feature_map.at_zero))
    else:
        assert name != "elu"


@pytest.mark.parametrize("name", SHARED + LEARNED)
def test_shapes_and_signs(name):
    feature_map = made(name)
    q, k = heads(4), heads(2, seed=1)
    assert feature_map.query(q, POSITION).shape == (2, 5, 4, feature_map.feature_dim)
    assert feature_map.key(k, POSITION).shape == (2, 5, feature_map.state_heads, feature_map.feature_dim)
    assert feature_map.state_heads == (4 if name in LEARNED else 2)
    assert (products(feature_map, q, k).min() >= 0) == feature_map.non_negative


@pytest.mark.parametrize("name", SHARED + LEARNED)
@pytest.mark.parametrize("size", [0.0, 1.0, 300.0])
def test_long_heads_stay_finite_in_float32(name, size):
    feature_map = made(name).float()
    q, k = (x.float().requires_grad_() for x in (heads(4, size=size), heads(2, size=size, seed=1)))
    phi_q, phi_k = feature_map.query(q, POSITION), feature_map.key(k, POSITION)
    weight = phi_q.sum(2).sum(1) @ phi_k.sum(2).sum(1).T
    assert weight.isfinite().all()
    if feature_map.non_negative and name != "taylor":
        assert (phi_q > 0).all(-1).any() or name == "cosformer"
        assert (weight > 0).all(), "a running sum must have something to divide by"
    for gradient in torch.autograd.grad(weight.sum(), (q, k)):
        assert gradient.isfinite().all()


def test_relu():
    x = heads(2)
    close(made("relu").key(x), torch.where(x > 0, x, 1e-12))


def test_elu():
    x = heads(2, size=3.0)
    phi = made("elu").query(x)
    close(phi, torch.nn.functional.elu(x) + 1)
    assert (made("elu").key(x.float() * 10) > 0).all(), "float32 rounds 1 + elu to zero"


def test_softmax_dim():
    x = heads(2)
    phi = made("softmax_dim").key(x)
    close(phi, x.exp() / x.exp().sum(-1, keepdim=True))
    close(phi.sum(-1), torch.ones(2, 5, 2, dtype=torch.float64))


def test_exp():
    q, k = heads(4), heads(2, seed=1)
    exact = torch.einsum("bthf,bshf->bhts", (2 * q).exp(), (2 * k).exp().repeat_interleave(2, 2))
    close(products(made("exp", scale=2.0, less_maximum="none"), q, k), exact)
    shifted = products(made("exp", scale=2.0), q, k)
    close(shifted / shifted.sum(-1, keepdim=True), exact / exact.sum(-1, keepdim=True))
    close(shifted, exact * (-2 * q.amax(-1)).exp().transpose(1, 2)[..., None])
    assert made("exp", less_maximum="both").key(k).amax(-1).eq(1).all()


def test_learned_scales_of_exp_spread_the_weights_as_softmax_does():
    """Linear Log-Normal attention: the standard deviation of log weights is that of the scores, head by head."""
    q, k = heads(4, size=2.0).flatten(0, 1).float(), heads(2, seed=1).flatten(0, 1).float()
    learned = made("exp", learned=True).float()
    close(
        products(learned, q[None], k[None]),
        products(made("exp").float(), q[None], k[None]),
    )
    opens = torch.arange(len(q)) == 0
    (start,) = learned.starts(Statistics(SHAPE, q, k, opens, lambda: pytest.fail("not asked for")))
    assert {name: value.shape for name, value in start.items()} == {
        "query_scale": (4, 1),
        "key_scale": (2, 1),
    }
    for head in range(4):
        a, b = (start[name][at] for name, at in (("query_scale", head), ("key_scale", head // 2)))
        weights = ((a * q[:, head])[:, None] + (b * k[:, head // 2])[None]).exp().sum(-1)
        spread = (SHAPE.scaling * q[:, head] @ k[:, head // 2].T).std()
        assert weights.log().std() == pytest.approx(float(spread), rel=0.15)


def test_identity():
    q, k = heads(4), heads(2, seed=1)
    close(products(made("identity"), q, k), 0.3 * scores(q, k))
    close(products(made("identity", scaled=False), q, k), scores(q, k))
    cosines = scores(q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True))
    close(products(made("identity", l2_normalize=True, scaled=False), q, k), cosines)


def test_signed_features_are_refused_under_a_running_sum():
    assert not FEATURE_MAPS.get("identity").non_negative
    problems = "\n".join(check({"feature_map": {"name": "identity"}}))
    assert "'identity' has signed features, which a running-sum normalizer cannot divide by" in problems


def test_taylor_is_the_second_order_expansion():
    q, k = heads(4, size=2.0), heads(2, size=2.0, seed=1)
    z = 0.3 * scores(q, k)
    whole = made("taylor", dim=0)
    close(products(whole, q, k), 1 + z + z**2 / 2)
    assert whole.state_heads == 2 and not list(whole.parameters())
    part = made("taylor", dim=4)
    assert part.feature_dim == 15
    z = scores(q[..., :4], k[..., :4]) / 2
    close(products(part, q, k), 1 + z + z**2 / 2)
    assert products(part, q, k).min() >= 0.5


def test_taylor_at_the_published_size():
    wide = LayerShape(heads=4, kv_heads=2, key_dim=64, value_dim=64, scaling=0.125)
    assert made("taylor", wide).feature_dim == 153
    assert made("taylor", wide, dim=0).feature_dim == 2145


def test_t2r_starts_as_the_rectified_heads():
    q, k = heads(4), heads(2, seed=1)
    feature_map = made("t2r", dim=8)
    close(feature_map.query(q), q.relu().clamp_min(1e-12))
    close(feature_map.key(k), k.relu().clamp_min(1e-12).repeat_interleave(2, 2))
    both = made("t2r", dim=12).query(q)
    close(both[..., 8:], (-q[..., :4]).relu().clamp_min(1e-12))


@pytest.mark.parametrize(("bias", "size"), [("feature", 6), ("head", 1), ("none", 0)])
@pytest.mark.parametrize("tied", [False, True])
def test_t2r_is_one_layer_per_head(bias, size, tied):
    feature_map = made("t2r", dim=6, bias=bias, tied=tied)
    assert sum(p.numel() for p in feature_map.parameters()) == (1 if tied else 2) * 4 * (8 * 6 + size)
    for parameter in feature_map.parameters():
        torch.nn.init.normal_(parameter)
    q, k = heads(4), heads(2, seed=1)
    weight, offset = feature_map.query_weight, feature_map.query_bias
    for head in range(4):
        u = q[:, :, head] @ weight[head] + (offset[head] if size else 0.0)
        close(feature_map.query(q)[:, :, head], u.clamp_min(1e-12))
    if not tied:
        weight, offset = feature_map.key_weight, feature_map.key_bias
    for head in range(4):
        u = k[:, :, head // 2] @ weight[head] + (offset[head] if size else 0.0)
        close(feature_map.key(k)[:, :, head], u.clamp_min(1e-12))


@pytest.mark.parametrize("activation", ["softmax", "exp"])
def test_hedgehog_is_two_signs_of_one_projection(activation):
    x = heads(4)
    phi = made("hedgehog", dim=8, activation=activation).query(x)
    if activation == "softmax":
        close(phi, torch.cat([x.softmax(-1), (-x).softmax(-1)], -1))
        close(phi.sum(-1), torch.full((2, 5, 4), 2.0, dtype=torch.float64))
    else:
        top, bottom = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
        close(phi, torch.cat([(x - top).exp(), (bottom - x).exp()], -1))


def test_learned_maps_share_the_state_when_asked():
    for name in LEARNED:
        assert made(name, dim=4, per="kv_head").state_heads == 2
        assert check({"feature_map": {"name": name, "per": "kv_head", "tied": True}})


def test_performer_estimates_the_softmax_kernel():
    q, k = heads(4, size=0.5), heads(2, size=0.5, seed=1)
    exact = (0.3 * scores(q, k)).exp()

    def error(dim: int) -> float:
        estimates = [
            products(made("performer", dim=dim, seed=seed, less_maximum="none"), q, k) for seed in range(8)
        ]
        return ((torch.stack(estimates).mean(0) - exact) / exact).square().mean().sqrt().item()

    assert error(4096) < 0.03
    assert error(4096) < error(64) / 4, "the error falls with the square root of the number of features"


def test_performer_less_its_maximum_gives_the_same_weights():
    q, k = heads(4), heads(2, seed=1)
    plain, shifted = (products(made("performer", less_maximum=choice), q, k) for choice in ("none", "query"))
    close(shifted / shifted.sum(-1, keepdim=True), plain / plain.sum(-1, keepdim=True))


def test_performer_draws_orthogonal_rows_of_normal_length():
    wide = LayerShape(heads=1, kv_heads=1, key_dim=32, value_dim=8, scaling=1.0)
    rows = made("performer", wide, dim=4096).projection
    block = rows[32:64] @ rows[32:64].T
    assert (block - block.diag().diag()).abs().max() < 1e-5
    assert abs(rows.square().sum(1).mean().item() / 32 - 1) < 0.02
    assert rows.mean(0).abs().max() < 0.06


def test_performer_is_drawn_the_same_everywhere(tmp_path):
    cls = FEATURE_MAPS.get("performer")
    here = cls(cls.Config(), SHAPE)
    assert torch.equal(here.projection, cls(cls.Config(), SHAPE).projection)
    assert not torch.equal(here.projection, cls(cls.Config(seed=1), SHAPE).projection)
    with torch.device("meta"):
        elsewhere = cls(cls.Config(), SHAPE)
    assert elsewhere.projection.is_meta
    elsewhere.to_empty(device="cpu")
    elsewhere.reset_parameters()
    assert torch.equal(here.projection, elsewhere.projection)


def test_performer_survives_a_checkpoint(tmp_path):
    model = surgery.convert(tiny.model(), {"feature_map": {"name": "performer", "dim": 16}})
    for layer in surgery.converted(model):
        layer.mixer.feature_map.projection.mul_(1.5)  # what counts is the checkpoint, not the seed
    linearize.save(model, tmp_path / "out")
    ids = tiny.tokens()
    with torch.no_grad():
        assert torch.equal(linearize.load(tmp_path / "out")(ids).logits, model(ids).logits)
    half = linearize.load(tmp_path / "out", dtype=torch.bfloat16)
    assert {layer.mixer.feature_map.projection.dtype for layer in surgery.converted(half)} == {torch.float32}


def test_performer_is_drawn_when_teacher_weights_load_into_the_converted_class(tmp_path):
    teacher = tiny.model()
    teacher.save_pretrained(tmp_path)
    model = surgery.convert(teacher, {"feature_map": {"name": "performer", "dim": 16}})
    loaded = type(model).from_pretrained(tmp_path, config=model.config)
    for one, other in zip(surgery.converted(loaded), surgery.converted(model), strict=True):
        assert torch.equal(one.mixer.feature_map.projection, other.mixer.feature_map.projection)


def test_cosformer_weighs_by_distance():
    q, k = heads(4), heads(2, seed=1)
    distance = (POSITION[:, :, None] - POSITION[:, None, :]).double()
    kernel = (math.pi / 2 * distance / 20).cos()[:, None]
    expected = scores(q.relu().clamp_min(1e-12), k.relu().clamp_min(1e-12)) * kernel
    close(products(made("cosformer", length=20), q, k), expected)


def test_cosformer_never_turns_negative():
    feature_map = made("cosformer", length=4).float()
    x = heads(4).float().abs()
    far = torch.tensor([[0, 4, 5, 9, 1000]]).expand(2, -1)
    phi = feature_map.query(x, far)
    assert torch.einsum("bthf,bshf->bhts", phi, phi).min() >= 0


def test_cosformer_asks_for_positions():
    with pytest.raises(LinearizeError, match="need position"):
        made("cosformer").query(heads(4))


def test_positions_restart_with_documents_and_skip_padding():
    valid = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    docs = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 3, 3, 3]])
    position, carried = positions(valid, docs, torch.tensor([0, 10]))
    assert position.tolist() == [[-1, -1, 0, 1, 2, 0, 1, 2], [10, 11, 0, 1, 2, 0, 1, 2]]
    assert carried.tolist() == [3, 3]
    gap = torch.tensor([[1, 0, 0, 1, 0, 1]], dtype=torch.bool)
    position, carried = positions(gap, torch.zeros(1, 6, dtype=torch.int64), torch.tensor([4]))
    assert position.tolist() == [[4, 4, 4, 5, 5, 6]]
    assert carried.tolist() == [7]
    _, carried = positions(valid[:1, :2], docs[:1, :2], torch.tensor([0]))
    assert carried.tolist() == [0]


@pytest.mark.parametrize("window", [{"name": "none"}, {"name": "sliding", "size": 5}])
def test_cosformer_forms_agree_past_its_length(window):
    mixer = {"feature_map": {"name": "cosformer", "length": 16}, "window": window}
    made_mixer = build(mixer, SHAPE).double()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 60, n, 8, generator=generator, dtype=torch.float64) for n in (4, 2, 2))
    valid = torch.ones(1, 60, dtype=torch.bool)
    valid[:, :9] = False
    expected = made_mixer.parallel(q, k, v, valid=valid)
    close(expected[:, 9:], made_mixer.parallel(q[:, 9:], k[:, 9:], v[:, 9:]))
    state = made_mixer.initial_state(1, torch.float64, q.device)
    parts = [made_mixer.chunked(q[:, :20], k[:, :20], v[:, :20], valid=valid[:, :20], state=state)]
    parts += [
        made_mixer.step(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], state=state) for t in range(20, 60)
    ]
    torch.testing.assert_close(torch.cat(parts, 1)[:, 9:], expected[:, 9:], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "exp", "less_maximum": "key"}, "less_maximum: 'key' is not one of query, both, none"),
        ({"name": "exp", "scale": 0}, "scale: must be above 0 and at most 1000, got 0"),
        ({"name": "t2r", "bias": "token"}, "bias: 'token' is not one of feature, head, none"),
        ({"name": "t2r", "dim": 0}, "dim: must be at least 1"),
        ({"name": "taylor", "dim": -1}, "dim: must be at least"),
        ({"name": "taylor", "dim": 0, "per": "head"}, "per: 'head' is not one of"),
        ({"name": "performer", "dim": 0}, "dim: must be at least 1"),
        ({"name": "performer", "seed": -1}, "seed: must be at least 0"),
        ({"name": "performer", "less_maximum": "both"}, "is not one of query, none"),
        ({"name": "cosformer", "length": 0}, "length: must be at least 1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    assert message in "\n".join(check({"feature_map": options}))


@pytest.mark.parametrize("power", [1.0, 3.0, 8.0])
def test_focused_is_its_formula(power):
    """FLatten's equation 5: the direction of the powers at the length of the ReLU."""
    feature_map, q = made("focused", power=power), heads(4)
    found = feature_map.query(q)
    for row, head, token in ((0, 0, 0), (1, 3, 4)):
        u = q[row, token, head].clamp_min(0)
        close(found[row, token, head], (u.norm() * u**power / (u**power).norm()).clamp_min(1e-12))
    empty = torch.full((1, 1, 4, 8), -1.0, dtype=torch.float64, requires_grad=True)
    feature_map.query(empty).sum().backward()
    assert empty.grad.isfinite().all()


def test_attention_of_focused_features_is_its_sums():
    """Token by token, numerator and denominator, where a key head serves two query heads."""
    torch.manual_seed(0)
    x = Draw.of(SHAPE, 40, torch.float64)
    out = x.run(build({"feature_map": {"name": "focused"}}, SHAPE).double().chunked)

    def phi(y):
        u = y.clamp_min(0)
        return (u.norm() * u**3 / (u**3).norm()).nan_to_num(0.0).clamp_min(1e-12)

    for head in range(SHAPE.heads):
        n, sums, norms = head // SHAPE.group, torch.zeros(SHAPE.key_dim, SHAPE.value_dim).double(), 0.0
        for t in range(40):
            key, query = phi(x.k[1, t, n]), phi(x.q[1, t, head])
            sums, norms = sums + torch.outer(key, x.v[1, t, n]), norms + key
            torch.testing.assert_close(out[1, t, head], query @ sums / (query @ norms), atol=1e-11, rtol=1e-9)
