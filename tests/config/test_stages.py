"""Fields of one stage: what they mean together, and what is refused before any weight is loaded."""

from __future__ import annotations

import pytest

from linearize.config import compose, to_yaml
from linearize.errors import RecipeError


def test_a_stage_changes_what_it_reads_of_the_data():
    recipe = compose(
        "lolcats",
        ["data.source=books.txt", "stages.recover.data.template=chat", "stages.recover.data.length=64"],
    )
    assert recipe.data.of(recipe.stages["transfer"]) == recipe.data
    own = recipe.data.of(recipe.stages["recover"])
    assert (own.source, own.template, own.length) == ("books.txt", "chat", 64)
    assert own.validation == recipe.data.validation
    assert compose("lolcats", ["stages.recover.data=null"]) == compose("lolcats")


def test_stage_options_survive_their_own_yaml(tmp_path):
    options = (
        "{objective: logits_kl, train: all, lr_mixers: 2e-3, freeze: [norms, mlp], untie: true, "
        "data: {length: 8}}"
    )
    recipe = compose("lolcats", [f"stages.full={options}", "stages.transfer.window_dropout=0.25"])
    file = tmp_path / "written.yaml"
    file.write_text(to_yaml(recipe))
    assert compose(file) == recipe
    assert compose(file).stages["full"].freeze == ["norms", "mlp"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["stages.full={objective: logits_kl, train: all, freeze: [embedings]}"],
            "did you mean 'embeddings'?",
        ),
        (["stages.full={objective: logits_kl, train: all, freeze: [mlp, mlp]}"], "names 'mlp' twice"),
        (
            ["stages.full={objective: logits_kl, train: all, freeze: embeddings, untie: true}"],
            "stages.full.untie: frozen embeddings stay equal",
        ),
        (["stages.transfer.freeze=[mlp]"], "stages.transfer.freeze: names what train: [all] leaves out"),
        (
            ["stages.transfer.untie=true"],
            "stages.transfer.untie: the embeddings train only with train: [all]",
        ),
        (["stages.recover.lr_mixers=1e-3"], "stages.recover.lr_mixers: the mixers do not train"),
        (["stages.transfer.lr_mixers=0"], "stages.transfer.lr_mixers: must be above 0"),
        (
            ["stages.transfer.window_dropout=1.5"],
            "stages.transfer.window_dropout: must be at least 0 and at most 1",
        ),
        (
            ["stages.recover.window_dropout=0.5"],
            "stages.recover.window_dropout: without its window this mixer sees nothing at the start of a document",
        ),
        (["stages.transfer.window_dropout=0.5", "mixer.window=none"], "the mixer has no window"),
        (
            ["stages.transfer.data.lenght=64"],
            "stages.transfer.data.lenght: unknown key; did you mean 'length'?",
        ),
        (["stages.transfer.data.template=chta"], "unknown value 'chta'; did you mean 'chat'?"),
        (
            ["stages.transfer.data.length=1"],
            "stages.transfer.data.length: must be at least 2 and at most 10000000, got 1",
        ),
        (["stages.transfer.data.source=[]"], "stages.transfer.data.source: must be builtin"),
        (
            ["stages.transfer.data.length=1000k", "stages.transfer.tokens=1M"],
            "stages.transfer.data.length 1000000",
        ),
        (
            ["stages.recover.objective={dpo: 1}"],
            "stages.recover.objective.dpo: compares pairs of answers; set stages.recover.data.template=preference",
        ),
        (
            ["stages.recover.data.template=preference"],
            "stages.recover.data.template: preference is for dpo alone",
        ),
        (
            [
                "stages.recover.objective={dpo: 1, next_token: 1}",
                "stages.recover.data={template: preference, source: pairs.jsonl}",
            ],
            "next_token is of the whole model and dpo is on pairs of answers; one stage trains on one kind",
        ),
        (["stages.recover.dpo_beta=0"], "stages.recover.dpo_beta: must be above 0"),
    ],
)
def test_single_mistakes(overrides, expected):
    with pytest.raises(RecipeError) as caught:
        compose("lolcats", overrides)
    text = str(caught.value)
    assert expected in text
    assert "1 problem\n" in text, text
