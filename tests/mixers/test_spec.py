"""The `mixer:` section: mistakes are found together, each with a remedy, and defaults are spelled out."""

from __future__ import annotations

import pytest

from linearize.mixers import LayerShape, build, check, normalize

SHAPE = LayerShape(heads=4, kv_heads=2, key_dim=8, value_dim=8, scaling=0.35)


def test_all_mistakes_at_once():
    problems = check(
        {
            "feature_map": {"name": "hedgehog", "dimm": 3, "per": 4},
            "windw": {"name": "sliding"},
            "gate": {"nmae": "low_rank", "name": "fixed"},
            "combine": {"name": "shared_normaliser"},
        }
    )
    text = "\n".join(problems)
    assert len(problems) == 5
    assert "mixer.gate.nmae: fixed has no such option; did you mean 'name'?" in text
    assert "mixer.feature_map.dimm: hedgehog has no such option; did you mean 'dim'?" in text
    assert "mixer.feature_map.per: 4 must be str" in text
    assert "mixer.windw: no such part; did you mean 'window'?" in text
    assert "did you mean 'shared_normalizer'?" in text


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        ({}, "neither a window nor a feature map"),
        ({"window": {"name": "full"}, "feature_map": {"name": "hedgehog"}}, "'full' leaves no key"),
        ({"feature_map": {"name": "hedgehog", "per": "head"}}, "'head' is not one of query_head, kv_head"),
        (
            {"feature_map": {"name": "hedgehog", "per": "kv_head", "tied": True}},
            "tied: true needs per: query_head",
        ),
        ({"window": {"name": "sliding", "size": 0}}, "size: must be at least 1"),
        ({"window": {"name": "sliding", "size": True}}, "true must be int"),
        ({"window": "sliding"}, "must be a mapping with a name"),
        (
            {
                "feature_map": {"name": "hedgehog"},
                "window": {"name": "sliding"},
                "combine": {"name": "shared_normalizer", "window_weight_init": 1},
            },
            "must be above 0 and below 1",
        ),
    ],
)
def test_impossible_sections_are_refused(mixer, message):
    assert message in "\n".join(check(mixer))


def test_defaults_are_spelled_out_and_stable():
    whole = normalize({"feature_map": {"name": "hedgehog"}, "window": {"name": "sliding", "size": 32}})
    assert whole["window"] == {
        "name": "sliding", "size": 32, "overlap": False, "first": 0, "within": 1024, "sinks": "none",
    }  # fmt: skip
    assert whole["feature_map"]["dim"] == 64
    assert whole["combine"]["window_weight_init"] == 0.1
    assert normalize(whole) == whole
    assert check(whole) == []


def test_lolcats_starts_as_published():
    mixer = build(
        {"feature_map": {"name": "hedgehog", "dim": 8}, "window": {"name": "sliding", "size": 4}}, SHAPE
    )
    assert mixer.combine.window_factor.sigmoid().allclose(mixer.combine.window_factor.new_tensor(0.1))
    assert mixer.feature_map.query_weight.shape == (4, 8, 8)
    assert (mixer.feature_map.query_weight == mixer.feature_map.key_weight).all()
    assert mixer.feature_map.query_weight[0].diagonal().sum() == 8


def test_sharing_key_features_shrinks_the_state_by_the_group():
    wide = build({"feature_map": {"name": "hedgehog", "dim": 8}}, SHAPE)
    shared = build({"feature_map": {"name": "hedgehog", "dim": 8, "per": "kv_head"}}, SHAPE)
    assert wide.state_bytes() == SHAPE.group * shared.state_bytes()


def test_a_key_that_yaml_reads_as_no_text_is_reported():
    """YAML 1.1 has words such as `on` for true."""
    problems = check({"feature_map": {"name": "relu"}, "short_conv": {"name": "depthwise", True: "qk"}})
    assert len(problems) == 1 and "mixer.short_conv.True: depthwise has no such option" in problems[0]
