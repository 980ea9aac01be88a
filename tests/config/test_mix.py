"""`data.source: teacher` and `data.mix`: what may stand there, and what is said of the rest."""

from __future__ import annotations

import pytest

from linearize.config import compose
from linearize.config.mix import parts, share, written
from linearize.config.schema import DataConfig
from linearize.errors import RecipeError


def problems(*overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        compose("lolcats", list(overrides))
    return caught.value.problems


def test_a_mix_from_the_command_line():
    recipe = compose("lolcats", ["data.mix={teacher: 0.5, books.parquet: 0.3, data/*.jsonl: 20k}"])
    assert recipe.data.mix == {"teacher": 0.5, "books.parquet": 0.3, "data/*.jsonl": "20k"}
    assert share(recipe.data, "books.parquet") == pytest.approx(0.3 / 20000.8)
    assert compose("lolcats", ["data.mix.teacher=2"]).data.mix == {"teacher": 2}
    assert compose("lolcats", ["data.source=teacher"]).data.source == "teacher"


def test_all_is_said_at_once():
    found = problems(
        "data.mix={teacher: 0, books.parquet: -1, a.jsonl: much, b.jsonl: {weigth: 1}, "
        "c.jsonl: {weight: 1, template: chta}, builtin: {weight: 1, template: chat}}",
        "data.source=corpus.txt",
        "data.teacher.temperature=-1",
        "data.teacher.chat=2",
        "data.teacher.batch=0",
        "data.teacher.tempo=1",
    )
    for words in (
        "data.mix.teacher: the weight must be above 0 and at most 1000000000, got 0; leave a source out",
        "data.mix.books.parquet: the weight must be above 0",
        "data.mix.a.jsonl: must be a weight, such as 0.5, or {weight: 0.5, template: chat}, got 'much'",
        "data.mix.b.jsonl.weigth: unknown key; did you mean 'weight'?",
        "data.mix.b.jsonl: has no weight",
        "data.mix.c.jsonl.template: unknown value 'chta'; did you mean 'chat'?",
        "data.mix.builtin.template: the text of builtin takes no template",
        "data.source='corpus.txt' stands beside it, and a mix takes the place of a source; take one of them out",
        "data.teacher.temperature: must be at least 0",
        "data.teacher.chat: must be at least 0 and at most 1, or auto, got 2",
        "data.teacher.batch: must be at least 1",
        "data.teacher.tempo: unknown key",
    ):
        assert any(words in problem for problem in found), (words, found)


@pytest.mark.parametrize(
    "override, words",
    [
        ("data.validation=teacher", "the teacher's own text is no measure of it"),
        ("data.source=[teacher,a.txt]", "data.mix={teacher: 1, a.txt: 1}, or teacher alone"),
        ("data.mix=[teacher]", "must be a mapping of names to values"),
        (
            "stages.transfer.data={source: a.txt, mix: {b.txt: 1}}",
            "stages.transfer.data.mix: stages.transfer.data.source=",
        ),
        (
            "stages.transfer.data={mix: {b.txt: 0}}",
            "stages.transfer.data.mix.b.txt: the weight must be above 0",
        ),
    ],
)
def test_refused(override, words):
    base = ["stages.transfer.data=null"] if override.startswith("stages") else []
    assert any(words in problem for problem in problems(*base, override))


def test_pairs_are_none_of_the_teachers():
    stage = "stages.more={objective: {dpo: 1}, train: [all], data: {template: preference}}"
    found = problems(stage, "data.source=teacher")
    assert any("the teacher's text holds no pairs; set stages.more.data.source to a file" in p for p in found)


def test_a_stage_has_its_own():
    recipe = compose("lolcats", ["data.mix={teacher: 1, a.txt: 1}", "stages.transfer.data={source: b.txt}"])
    assert recipe.data.of(recipe.stages["transfer"]).source == "b.txt"
    assert recipe.data.of(recipe.stages["transfer"]).mix == {}
    recipe = compose("lolcats", ["data.source=a.txt", "stages.transfer.data={mix: {teacher: 1, b.txt: 3}}"])
    own = recipe.data.of(recipe.stages["transfer"])
    assert share(own, "teacher") == 0.25 and own.source == "builtin"


def test_templates_are_for_sources_that_read_them():
    found = problems(
        "data.source=teacher", "data.template=chat", "~stages.transfer.data", "~stages.recover.data"
    )
    assert any("data.template: the teacher's text takes no template" in p for p in found)


def test_files_in_place_of_the_teacher():
    data = DataConfig(
        mix={"teacher": "1", "chat.jsonl": {"weight": 3, "template": "alpaca"}, "builtin": 4}, template="chat"
    )
    (name, part, read), (_, _, chat), (_, _, plain) = parts(written(data, ["p0", "p1"]))
    assert (name, part, read.source, read.template, read.mix) == (
        "teacher",
        0.125,
        ["p0", "p1"],
        "rendered",
        {},
    )
    assert chat.template == "alpaca" and plain.template == "none" and data.mix["teacher"] == "1"
    alone = written(DataConfig(source="teacher"), ["p0"])
    assert alone.source == ["p0"] and alone.template == "rendered"
    assert written(DataConfig(source="a.txt"), ["p0"]).source == "a.txt"


def test_a_text_on_the_command_line_takes_the_place_of_the_recipes_mix() -> None:
    assert compose("best_constant").data.mix
    made = compose("best_constant", ["data.source=mine.txt"])
    assert (made.data.source, made.data.mix) == ("mine.txt", {})
    made = compose("lolcats", ["data.mix={mine.txt: 1.0, builtin: 1.0}"])
    assert (made.data.source, list(made.data.mix)) == ("builtin", ["mine.txt", "builtin"])
    with pytest.raises(RecipeError, match="stands beside it"):
        compose("lolcats", ["data.source=mine.txt", "data.mix={builtin: 1.0}"])
