"""`layers:` and `mixers:`: every form, every slip, and what a variant inherits."""

from __future__ import annotations

import pytest

from linearize.config import compose, to_yaml
from linearize.config.layers import assign, idle, used
from linearize.config.variants import laid, sections
from linearize.errors import RecipeError

NAMES = ("window", "nope")
FOUR = [0, 1, 2, 3]
JAMBA = [4, 12, 20, 28]
"""Attention layers of a hybrid model."""
D, S, W, N = "default", "softmax", "window", "nope"


@pytest.mark.parametrize(
    ("layers", "indices", "given"),
    [
        ("all", FOUR, [D, D, D, D]),
        ([3, 1], FOUR, [S, D, S, D]),
        ({"every": 2}, FOUR, [D, S, D, S]),
        ({"every": 3}, JAMBA, [D, D, S, D]),
        ({"keep": [12]}, JAMBA, [D, S, D, D]),
        ({"keep": {"last": 1}}, JAMBA, [D, D, D, S]),
        ({"keep": {"first": 1, "every": 4}}, FOUR, [S, D, D, S]),
        ({"keep": {"first": 0.5}}, FOUR, [S, S, D, D]),
        ({"keep": {"first": 0.5, "last": 0.3}}, JAMBA, [S, S, D, S]),
        ({"keep": {"first": 0.5}}, [0, 1, 2], [S, D, D]),
        ({"keep": {"last": 0.01}}, FOUR, [D, D, D, S]),
        ("LLLS", FOUR, [D, D, D, S]),
        ("LS", JAMBA, [D, S, D, S]),
    ],
)
def test_who_gets_what(layers, indices, given):
    assert list(assign(layers, indices).values()) == given


@pytest.mark.parametrize(
    ("layers", "given"),
    [
        ({"use": {"window": {"first": 2}, "nope": [3]}}, [W, W, D, N]),
        ({"keep": [1], "use": {"window": {"every": 4}, "nope": [2]}}, [D, S, N, W]),
        ({"every": 2, "use": {"window": [0], "nope": [2]}}, [W, S, N, S]),
        ({"use": {"window": [1, 0], "nope": {"last": 2}}}, [W, W, N, N]),
        ("WN", [W, N, W, N]),
        ("LWNS", [D, W, N, S]),
    ],
)
def test_who_gets_which_mixer(layers, given):
    assert list(assign(layers, FOUR, NAMES).values()) == given
    assert set(given) - {S} <= set(used(layers, NAMES))


def test_shares_of_the_layers_are_rounded_down():
    for layers, share, count in ((30, 0.5, 15), (7, 0.5, 3), (12, 0.25, 3), (10, 0.7, 7), (2, 0.9, 1)):
        given = assign({"use": {"window": {"first": share}}}, range(layers), ["window"])
        assert list(given.values()) == count * [W] + (layers - count) * [D], (layers, share)


def test_a_pattern_says_which_mixers_are_used():
    assert used("WN", NAMES) == [N, W] and used("SNWL", NAMES) == [D, N, W] and used("all") == [D]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"keep": [7]}, "layers.keep: the model has no attention layer 7; its layers are 0 to 3"),
        ({"keep": {"first": 5}}, "layers.keep.first: 5, but the model has 4 attention layers"),
        ({"keep": {"last": 9}}, "layers.keep.last: 9, but the model has 4"),
        ({"keep": {"first": 4}}, "leaves no layer to convert"),
        ({"keep": {"first": 0.5, "last": 0.5}}, "leaves no layer to convert"),
        ({"keep": FOUR}, "leaves no layer to convert"),
        ("LLLLS", "the pattern has 5 letters, and the model 4 attention layers"),
    ],
)
def test_what_only_the_model_shows(layers, message):
    with pytest.raises(RecipeError, match=message):
        assign(layers, FOUR)


def test_two_rules_that_meet_in_this_model_alone():
    layers = {"keep": {"every": 2}, "use": {"window": {"last": 1}, "nope": [4]}}
    assert list(assign(layers, [0, 1, 2, 3, 4, 5, 6], NAMES).values()) == [D, S, D, S, N, S, W]
    with pytest.raises(RecipeError, match=r"layers\.use\.window: names layer 5, as layers\.keep does"):
        assign(layers, [0, 1, 2, 3, 4, 5], NAMES)


def test_layers_that_two_rules_name_are_told_together():
    layers = {"keep": {"every": 2}, "use": {"window": {"last": 0.5}, "nope": {"first": 0.75}}}
    with pytest.raises(RecipeError) as caught:
        assign(layers, range(12), NAMES)
    text = str(caught.value)
    assert "layers.use.window: names layers 7, 9, 11, as layers.keep does; a layer has one mixer" in text
    assert (
        "layers.use.nope: names layers 1, 3, 5, 7, as layers.keep does" not in text
    )  # 7 is the window's by then
    assert "layers.use.nope: names layers 1, 3, 5, as layers.keep does" in text
    assert "layers.use.nope: names layers 6-8, as layers.use.window does" in text and "3 problems" in text


def test_rules_that_reach_nobody_do_no_harm():
    layers = {"keep": {"every": 9}, "use": {"window": {"every": 5}, "nope": [1]}}
    assert idle(layers, 4, NAMES) == [
        "layers.keep.every: 9, but the model has 4 attention layers, so none stays softmax",
        "layers.use.window.every: 5, but the model has 4 attention layers, so none gets window",
    ]
    assert list(assign(layers, FOUR, NAMES).values()) == [D, N, D, D]


VARIANT = "mixers.window.feature_map=none"
SLIPS = [
    (["layers.use.windw=[0]", VARIANT, "layers.use.window=[1]"], "no such mixer; did you mean 'window'?"),
    (["layers.use.default=[0]"], "layers.use.default: no such mixer; what no rule names gets `mixer`"),
    (["layers.use.softmax=[0]"], "layers.use.softmax: no such mixer; layers.keep says what stays softmax"),
    (["layers.use=3"], "layers.use: must map names of mixers to their layers, got 3"),
    (["layers.use.window=3", VARIANT], "layers.use.window: must be a list of layer numbers, or {every: 4}"),
    (["layers.use.window=[]", VARIANT], "layers.use.window: an empty list names no layer"),
    (["layers.use.window={}", VARIANT], "layers.use.window: must be a list of layer numbers"),
    (["layers.use.window=[a]", VARIANT], "layers.use.window: layer numbers are whole"),
    (["layers.use.window={firs: 1}", VARIANT], "layers.use.window.firs: unknown key; did you mean 'first'?"),
    (["layers.use.window={first: 0}", VARIANT], "layers.use.window.first: must be at least 1"),
    (["layers.use.window={last: 99999}", VARIANT], "layers.use.window.last: must be at least 1 and at most 10"),
    (["layers.use.window={first: 1.0}", VARIANT], "must be a whole number (or a share of the layers, above 0"),
    (["layers.use.window={last: 1.5}", VARIANT], "layers.use.window.last: must be a whole number (or a share"),
    (["layers.use.window={every: 0.5}", VARIANT], "layers.use.window.every: must be a whole number, got 0.5"),
    (["layers={keep: [0], use: {window: {first: 0.1}}}", VARIANT], "names layer 0, as layers.keep does"),
    (["layers={keep: {last: 0.1}, use: {window: {last: 2}}}", VARIANT], "names the last attention layer"),
    (["layers.use.window={every: true}", VARIANT], "layers.use.window.every: must be a whole number, got true"),
    (["layers={keep: [0], use: {window: [0, 1]}}", VARIANT], "names layer 0, as layers.keep does"),
    (["layers={keep: [3], use: {window: {first: 4}}}", VARIANT], "names layer 3, as layers.keep does"),
    (["layers={every: 4, use: {window: {first: 4}}}", VARIANT], "names the attention layer at place 4, as"),
    (["layers={keep: {last: 1}, use: {window: {last: 2}}}", VARIANT], "names the last attention layer"),
    (["layers={keep: {first: 1}, use: {window: {first: 2}}}", VARIANT], "names the first attention layer"),
    (["layers={every: 4, keep: [1]}"], "layers.every: is short for keep: {every: n}"),
    ([VARIANT], "mixers.window: no layer gets it; name its layers (layers.use.window=[0]), or take it out"),
    (["layers=LLX"], "layers: the letter X begins the name of no mixer; mixers: names none"),
    (["layers=LXW", VARIANT], "layers: the letter X begins the name of no mixer; valid: window"),
    (["layers=WL", VARIANT, "mixers.wide.window.size=9"], "the letter W could be window or wide; rename one"),
    (["layers=SSS"], "layers: the pattern 'SSS' leaves no layer to convert"),
    (["layers=lls"], "layers: must be all, {every: 4}"),
    (["layers=ALL"], "layers: must be all, {every: 4}"),
    (["mixers.softmax.window.size=9", "layers.use.x=[1]", "~layers.use.x"], "mixers.softmax: the name is taken"),
    (["mixers.a={}", "layers.use.a=[1]"], "mixers.a: changes nothing in `mixer`"),
    (["mixers.a=3", "layers.use.a=[1]"], "mixers.a: must be a mapping of parts, as `mixer` is, got 3"),
    (["mixers.a.window=3", "layers.use.a=[1]"], "mixers.a.window: must be a name or {name:"),
    (["mixers.a.window.sise=3", "layers.use.a=[1]"], "mixers.a.window.sise: sliding has no such option; did you"),
    (["mixers.a.windw.size=3", "layers.use.a=[1]"], "mixers.a.windw: no such part; did you mean 'window'?"),
    (["mixers.a.window=none", "mixers.a.feature_map=none", "layers.use.a=[1]"], "mixers.a: neither a window nor"),
    (["mixers.a.update=delta", "layers.use.a=[1]"], "mixers.a.update: 'delta' needs keys at their own time"),
    (
        ["stages.transfer.window_dropout=0.5", VARIANT, "layers=WS"],
        "stages.transfer.window_dropout: the mixer has no feature_map",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), SLIPS)
def test_slips(overrides, message):
    with pytest.raises(RecipeError) as caught:
        compose("lolcats", overrides)
    assert message in str(caught.value)


def test_all_slips_are_told_together():
    overrides = [
        "mixer.window.size=0", "mixers.a.window.sise=3", "mixers.b.update=delta", "layers.use={a: [1], c: {every: 1}}",
    ]  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        compose("lolcats", overrides)
    text = str(caught.value)
    for part in (
        "mixer.window.size: must",
        "mixers.a.window.sise",
        "layers.use.c: no such",
        "use.c.every: must",
    ):
        assert part in text
    assert text.count("window.size") == 1, "what a variant inherits is said once"


MIXER = {
    "short_conv": {"name": "depthwise"},
    "feature_map": {"name": "hedgehog", "dim": 8},
    "gate": {"name": "low_rank"},
    "window": {"name": "sliding", "size": 64, "overlap": True},
    "output": {"name": "gate", "rank": 3},
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"window": {"size": 128}}, {**MIXER, "window": {"name": "sliding", "size": 128, "overlap": True}}),
        ({"window": {"name": "sliding", "size": 9}}, {**MIXER, "window": {**MIXER["window"], "size": 9}}),
        ({"window": {"name": "terraced"}}, {**MIXER, "window": {"name": "terraced"}}),
        ({"window": {"overlap": None}}, {**MIXER, "window": {"name": "sliding", "size": 64}}),
        ({"output": None}, {key: value for key, value in MIXER.items() if key != "output"}),
        (
            {"feature_map": {"name": "none"}, "output": None},
            {"window": MIXER["window"], "feature_map": {"name": "none"}},
        ),
        ({"feature_map": None, "output": None}, {"window": MIXER["window"]}),
    ],
)
def test_a_variant_is_what_it_changes(change, expected):
    kept = {part: dict(options) for part, options in MIXER.items()}
    assert laid(MIXER, change) == expected
    assert kept == MIXER


def test_files_lay_mixers_over_each_other(tmp_path):
    (tmp_path / "one.yaml").write_text(
        "defaults: [lolcats, _self_]\nlayers: LW\nmixers: {window: {feature_map: none, window: {size: 9, first: 2}}}\n"
    )
    (tmp_path / "two.yaml").write_text(
        "defaults: [one, _self_]\nmixers: {window: {window: {name: terraced}}, longer: {window: {size: 256}}}\n"
        "layers: {use: {window: {first: 1}, longer: [5]}}\n"
    )
    recipe = compose(tmp_path / "two.yaml", ["mixers.longer.window.size=200", "mixer.window.size=32"])
    whole = sections(recipe.mixer, recipe.mixers)
    assert whole["window"]["window"] == {"name": "terraced"}, "the options of the other choice are gone"
    assert whole["longer"]["window"] == {"name": "sliding", "size": 200, "first": 4}
    assert whole["default"]["window"]["size"] == 32
    assert recipe.mixers["window"]["feature_map"] == {"name": "none"}
    (tmp_path / "three.yaml").write_text(
        "defaults: [two, _self_]\nmixers: {window: null, longer: null}\nlayers: all\n"
    )
    assert compose(tmp_path / "three.yaml").mixers == {}
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    assert compose(tmp_path / "again.yaml") == recipe


def test_null_takes_a_rule_out_of_what_a_file_starts_from(tmp_path):
    (tmp_path / "wide.yaml").write_text(
        "defaults: [lolcats]\nmixers: {wide: {window: {size: 128}}}\n"
        "layers: {keep: {last: 1, first: 1}, use: {wide: [1]}}\n"
    )
    for changes, layers in (
        ("mixers: {wide: null}\nlayers: {use: {wide: null}}", {"keep": {"first": 1, "last": 1}}),
        ("layers: {keep: {last: null}}", {"keep": {"first": 1}, "use": {"wide": [1]}}),
        ("layers: {keep: null}", {"use": {"wide": [1]}}),
        ("mixers: {wide: null}\nlayers: {keep: null, use: null}", "all"),
    ):
        (tmp_path / "mine.yaml").write_text(f"defaults: [wide]\n{changes}\n")
        assert compose(tmp_path / "mine.yaml").layers == layers
