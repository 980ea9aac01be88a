from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from linearize.config import compose, list_recipes, outline, to_yaml
from linearize.config.check import check
from linearize.config.compose import RECIPES
from linearize.errors import RecipeError

FILES = sorted(path.stem for path in Path(RECIPES).rglob("*.yaml") if path.parent.name != "launch")
SHIPPED = [name for name in FILES if name != "base" and not name.startswith("base_")]


@pytest.fixture
def write(tmp_path):
    """Write a recipe file and give its path."""

    def file(text: str, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return file


def problems_of(recipe, overrides=()) -> str:
    with pytest.raises(RecipeError) as caught:
        compose(recipe, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_composes_and_survives_its_own_yaml(name, tmp_path):
    recipe = compose(name)
    assert recipe.description and recipe.paper and "\n" not in recipe.description
    file = tmp_path / "written.yaml"
    file.write_text(to_yaml(recipe))
    assert compose(file) == recipe


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_is_short_explains_itself_and_names_no_model(name):
    text = (Path(RECIPES) / f"{name}.yaml").read_text()
    assert text.startswith("# ") and len(text.splitlines()) <= 60
    assert "model:" not in text


@pytest.mark.parametrize("name", SHIPPED)
def test_the_outline_is_what_hydra_composes(name):
    assert check(outline(name)) == (compose(name), [])


def test_listing_leaves_building_blocks_out():
    assert [name for name, _ in list_recipes()] == SHIPPED


def test_overrides_of_every_shape():
    recipe = compose(
        "lolcats",
        [
            "stages.transfer.lr=5e-3",
            "stages.transfer.tokens=2M",
            "mixer.window.size=32",
            "layers=[0,2]",
            "stages.recover.lora.rank=4",
            "eval.texts.books=books.parquet",
        ],
    )
    assert recipe.stages["transfer"].lr == 5e-3
    assert recipe.stages["transfer"].tokens == 2_000_000
    assert recipe.mixer["window"] == {"name": "sliding", "size": 32, "first": 4}
    assert recipe.layers == [0, 2]
    assert recipe.stages["recover"].lora is not None and recipe.stages["recover"].lora.rank == 4
    assert recipe.stages["recover"].lora.alpha == 16
    assert recipe.eval.texts == {"books": "books.parquet"}


def test_an_override_adds_a_section_that_is_null():
    recipe = compose(
        "lolcats",
        ["stages.recover.lora=null", "stages.recover.train=[lora]", "stages.recover.lora.rank=4"],
    )
    assert recipe.stages["recover"].lora is not None
    assert recipe.stages["recover"].lora.targets == ["q", "k", "v", "o"]


def test_overrides_replace_and_remove():
    recipe = compose(
        "lolcats", ["layers.every=2", "~stages.recover", "stages.transfer.objective=attention_weights"]
    )
    assert recipe.layers == {"every": 2}
    assert list(recipe.stages) == ["transfer"]
    assert recipe.stages["transfer"].objective == {"attention_weights": 1.0}
    assert list(compose("lolcats", ["stages.recover=null"]).stages) == ["transfer"]


def test_all_mistakes_are_reported_together_with_full_keys_and_suggestions():
    text = problems_of(
        "lolcats",
        [
            "stages.transfer.lrr=3",
            "stages.transfer.tokens=lots",
            "stages.transfer.objective.attention_outputs=1",
            "stages.recover.lora.rank=0",
            "stages.recover.lora.targets=[q,x]",
            "layer=[0]",
            "mixer.windw.size=3",
            "data.template=alpaka",
            "data.length=1",
            "run.device=gpu",
            "nonsense",
        ],
    )
    assert text.startswith("recipe 'lolcats': 11 problems")
    for expected in (
        "stages.transfer.lrr: unknown key; did you mean 'lr'?",
        "stages.transfer.tokens: must be a whole number",
        "stages.transfer.objective.attention_outputs: unknown objective; did you mean 'attention_output'?",
        "stages.recover.lora.rank: must be at least 1 and at most 65536, got 0",
        "stages.recover.lora.targets: unknown value 'x'",
        "layer: unknown key; did you mean 'layers'?",
        "mixer.windw: no such part; did you mean 'window'?",
        "data.template: unknown value 'alpaka'; did you mean 'alpaca'?",
        "data.length: must be at least 2 and at most 10000000, got 1",
        "run.device: unknown value 'gpu'",
        "'nonsense': no '='",
    ):
        assert expected in text


AGAIN = "{objective: next_token, tokens: 20000, train: [lora], lora: {}}"
"""A stage that goes on with the adapters of another, in whatever order it names their targets."""


def test_stages_that_share_an_adapter_agree_on_it():
    again = compose("lolcats", [f"stages.again={AGAIN}", "stages.again.lora.targets=[v,o,q,k]"])
    assert again.stages["again"].lora.rank == again.stages["recover"].lora.rank


def test_layers_are_imitated_as_long_as_nothing_but_mixers_has_trained():
    between = ["stages.recover.train=[mixers]", "~stages.recover.lora"]
    again = compose("lolcats", [*between, "stages.again={objective: attention_output, tokens: 20000}"])
    assert list(again.stages) == ["transfer", "recover", "again"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["stages.transfer.objective.next_token=1"], "so use two stages"),
        (["stages.transfer.objective={}"], "stages.transfer.objective: missing; valid: attention_output"),
        (
            ["stages.transfer.objective.attention_output=-1"],
            "must be at least 0 and at most 1000000000, got -1",
        ),
        (["stages.transfer.train=[mixers,all]"], "reaches the mixers alone"),
        (["stages.recover.lora=null"], "holds lora, but the stage has no lora section"),
        (["stages.recover.train=[mixers]"], "stages.recover.lora: would not train"),
        (["stages.recover.train=[lora,all]"], "all and lora exclude each other"),
        (
            [f"stages.again={AGAIN}", "stages.again.lora.rank=4"],
            "stages.again.lora.rank: 4 is not the 8 of stages.recover.lora.rank, and stages share one adapter",
        ),
        (
            [f"stages.again={AGAIN}", "stages.again.lora.targets=[q,v]"],
            "stages.again.lora.targets: ['q', 'v'] is",
        ),
        ([f"stages.again={AGAIN}", "stages.again.lora.merge=false"], "stages.again.lora.merge: false is not"),
        (
            ["stages.again={objective: attention_output, tokens: 20000}"],
            "stages.again.objective: attention_output imitates the model's own attention, and by then stage 'recover' "
            "(train: [lora]) has trained",
        ),
        (
            ["stages.recover.train=[all]", "~stages.recover.lora", "stages.again={objective: mixing_matrix}"],
            "stages.again.objective: mixing_matrix imitates",
        ),
        (["stages.recover.train=[loras]"], "did you mean 'lora'?"),
        (["stages.recover.train=[]"], "stages.recover.train: empty"),
        (["stages.recover.lora.targets=[q,q]"], "names 'q' twice"),
        (
            ["stages.transfer.tokens=100"],
            "= 8192; give 8192 tokens or more, or make one of the others smaller",
        ),
        (["stages.transfer.lr=0"], "stages.transfer.lr: must be above 0"),
        (["stages.transfer.warmup_ratio=1"], "below 1"),
        (["stages.transfer=3"], "stages.transfer: must be a section"),
        (["layers=[]"], "converts nothing"),
        (["layers=[0,0]"], "names layer 0 twice"),
        (["layers=[-1]"], "count from 0"),
        (["layers={every: 0}"], "layers.every"),
        (["layers={evry: 2}"], "did you mean 'every'?"),
        (["layers=most"], "must be all, {every: 4}"),
        (["mixer.window.name=slidin"], "did you mean 'sliding'?"),
        (["mixer.window.sise=3"], "did you mean 'size'?"),
        (["eval.tasks=[piqaa]", "eval.task_data=x"], "did you mean 'piqa'?"),
        (["eval.tasks=[all]"], "eval.task_data: the tasks need"),
        (["data.source=[]"], "data.source: must be"),
        (["data.boundaries=3"], "must be true or false"),
        (["run.precision=fp16"], "run.precision"),
        (["hydra.run.dir=x"], "hydra: unknown key"),
        (["~stages.recovr"], "nothing to remove; did you mean 'recover'?"),
    ],
)
def test_single_mistakes(overrides, expected):
    text = problems_of("lolcats", overrides)
    assert expected in text
    assert "1 problem\n" in text, text


def test_an_unknown_recipe_gets_the_nearest_name_and_the_list():
    text = problems_of("lolcat")
    assert "did you mean 'lolcats'?" in text and "hedgehog" in text and " base," not in text


def test_a_file_starts_from_a_shipped_recipe_even_under_its_name(write):
    file = write("defaults: [lolcats, _self_]\nlayers: {every: 4}\nstages: {recover: null}\n", "lolcats.yaml")
    recipe = compose(file, ["mixer.window.size=16"])
    assert recipe.layers == {"every": 4}
    assert list(recipe.stages) == ["transfer"]
    assert recipe.mixer["window"]["size"] == 16


def test_a_file_starts_from_its_neighbor_and_may_leave_self_out(write):
    write("defaults: [softmax]\nlayers: [0]\n", "first.yaml")
    assert compose(str(write("defaults: [first]\ndata: {length: 64}\n"))).layers == [0]


def test_a_file_may_stand_alone_and_use_short_forms(write):
    recipe = compose(
        write(
            """
            mixer: {feature_map: hedgehog, update: additive, window: none}
            stages:
              transfer: {objective: attention_weights, tokens: 1_000_000, train: mixers}
            """
        )
    )
    assert recipe.mixer["feature_map"] == {"name": "hedgehog"}
    assert recipe.stages["transfer"].objective == {"attention_weights": 1.0}
    assert recipe.stages["transfer"].train == ["mixers"]


def test_null_takes_inherited_things_out(write):
    recipe = compose(
        write(
            """
            defaults: [lolcats, _self_]
            mixer: {combine: null, feature_map: {dim: null}}
            stages: {transfer: {objective: {attention_output: null, attention_weights: 1}}}
            """
        )
    )
    assert "combine" not in recipe.mixer and "dim" not in recipe.mixer["feature_map"]
    assert recipe.stages["transfer"].objective == {"attention_weights": 1.0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("layers: [0\nb: 3", "not valid YAML"),
        ("layers: 1\nlayers: 2", "layers: stands twice, in lines 1 and 2"),
        ("", "holds no keys"),
        ("- 1", "holds no keys"),
        ("defaults: [lolcat]", "unknown recipe 'lolcat'; did you mean 'lolcats'?"),
        ("defaults: lolcats", "defaults: must be a list"),
        ("defaults: [mine]", "unknown recipe 'mine'"),
        ("defaults: [lolcats]\nstagse: {}", "stagse: unknown key; did you mean 'stages'?"),
        ("default: [lolcats]", "default: unknown key; did you mean 'defaults'?"),
        ("defaults: [lolcats]\ndata: 3", "data: must be a section"),
        ("defaults: [lolcats]\ndata: {source: '${nope}'}", "asks for a value from elsewhere"),
        ("defaults: [softmax]\nmixer: 3", "mixer: must be a mapping"),
        ("description: empty", "mixer: missing"),
    ],
)
def test_mistakes_in_a_file(write, text, expected):
    found = problems_of(write(text))
    assert expected in found and "mine.yaml" in found


def test_a_file_that_is_not_there():
    assert "No such file" in problems_of("./nowhere.yaml")
    assert "Is a directory" in problems_of("./")


def test_it_works_inside_a_program_that_runs_hydra_itself():
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module

    with initialize_config_module("linearize.recipes", version_base="1.3"):
        compose("softmax")
        assert hydra_compose("softmax").mixer.window.name == "full"
    compose("softmax")


def test_listing_and_reading_recipes_imports_no_torch():
    code = (
        "import sys; from linearize.config import compose, list_recipes; list_recipes();"
        "from linearize.config.compose import _load; _load('demo');"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(RECIPES).parent.parent).returncode == 0


def test_naming_another_part_drops_the_options_of_the_old_one(tmp_path):
    """One line swaps a part: LoLCATs' map has options that relu does not know."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        "defaults: [lolcats, _self_]\nmixer:\n  feature_map: {name: relu}\n  window: {name: sliding, first: 2}\n"
    )
    for recipe in (
        compose(path, []),
        compose("lolcats", ["mixer.feature_map.name=relu", "mixer.window.first=2"]),
    ):
        assert recipe.mixer["feature_map"] == {"name": "relu"}
        assert recipe.mixer["window"] == {"name": "sliding", "size": 64, "first": 2}, (
            "the same choice still merges"
        )


def test_a_shipped_recipe_says_the_same_from_another_folder(tmp_path):
    """Its file can be copied and changed: whose it is changes nothing of what it says."""
    for path in Path(RECIPES).glob("*.yaml"):
        shutil.copy(path, tmp_path)
    assert {name: compose(tmp_path / f"{name}.yaml") for name in SHIPPED} == {
        name: compose(name) for name in SHIPPED
    }
