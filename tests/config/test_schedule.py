"""Values over a stage: what is read, what is refused, and what a recipe may hold."""

from __future__ import annotations

from typing import Any

import pytest

from linearize.config import compose, to_yaml
from linearize.config.schedule import MOST, Over, read
from linearize.errors import RecipeError

WINDOW = "stages.transfer.window_dropout"


@pytest.mark.parametrize(
    ("written", "kind", "expected"),
    [
        ("1k", int, 1000),
        (0.5, float, 0.5),
        (["1k", 2_000], int, [1000, 2000]),
        ([[0, ".9"], [0.5, 0.75]], float, [[0, 0.9], [0.5, 0.75]]),
        ([[0, 8], ["1k", 32]], int, [[0, 8], [1000, 32]]),
    ],
)
def test_what_is_read(written: Any, kind: type, expected: Any) -> None:
    problems: list[str] = []
    assert read(written, kind, "key", problems) == expected
    assert not problems


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("much", "key: must be a number, got 'much'"),
        ([], "key: 0 parts; give 1 to 100, as a number, a list of numbers"),
        ([0.5] * (MOST + 1), "key: 101 parts; give 1 to 100"),
        ([0.5, [0.5, 0.2]], "key: must be a number, a list of numbers for equal parts of the stage, or"),
        ([[0, 0.5, 1]], "key: must be a number, a list of numbers"),
        ([0.5, "x"], "key[1]: must be a number, got 'x'"),
        ([[0, "x"]], "key[0]: must be a number, got [0, 'x']"),
        ([[0.1, 0.5]], "key: the first part begins at 0, got 0.1"),
        ([["x", 0.5]], "key: the first part begins at 0, got null"),
        ([[0, 0.5], [1.5, 0.2]], "or at a step, a whole number, got 1.5"),
        ([[0, 0.5], [-1, 0.2]], "a part begins at a share of the stage from 0 to below 1"),
        ([[0, 0.5], [0.5, 0.2], [10, 0.1]], "at shares of the stage or at steps, not at both"),
        ([[0, 0.5], [0.5, 0.2], [0.5, 0.1]], "parts begin one after the other, got [0, 0.5, 0.5]"),
    ],
)
def test_what_is_refused(written: Any, expected: str) -> None:
    problems: list[str] = []
    assert read(written, float, "key", problems) is None
    assert len(problems) == 1 and expected in problems[0], problems


def test_parts_in_shares_and_in_steps() -> None:
    thirds = Over.of([0.9, 0.75, 0.5])
    assert [thirds.at(0, trained, 900) for trained in (0, 299, 300, 599, 600, 899)] == [
        0.9, 0.9, 0.75, 0.75, 0.5, 0.5,
    ]  # fmt: skip
    steps = Over.of([[0, 1], [3, 2]])
    assert [steps.at(step, 0, 10) for step in (0, 2, 3, 99)] == [1, 1, 2, 2]
    assert Over.of(5).constant and Over.of([5, 5]).constant and not steps.constant
    assert (Over.of([[0, 512], [0.5, 256]]).most, Over.of(7).most) == (512, 7)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([f"{WINDOW}=[0.9,1.5]"], f"{WINDOW}[1]: must be at least 0 and at most 1, got 1.5"),
        ([f"{WINDOW}=[[0,0.9],[9000,0.5]]"], "a part begins at step 9000, and the stage has 2441 steps"),
        (["stages.transfer.batch_size=[8,0]"], "stages.transfer.batch_size[1]: must be at least 1"),
        (
            ["stages.transfer.batch_size=[8,12]", "stages.transfer.micro_batch=8"],
            "stages.transfer.micro_batch: 8 does not divide batch_size 12",
        ),
        (
            ["stages.transfer.data.length=[512,1000,4096]"],
            "stages.transfer.data.length: 1000 does not divide 4096, the longest, into which text is packed before it "
            "is cut; take 512",
        ),
        (["data.length=[512,1024]"], "data.length: must be a whole number"),
        (["stages.transfer.lr_schedule=cosin"], "unknown value 'cosin'; did you mean 'cosine'? (valid: cosine"),
        (["stages.transfer.lr_schedule=0.5"], "stages.transfer.lr_schedule: unknown value 0.5; valid: "),
        (["stages.transfer.lr_schedule=[1,2]"], "stages.transfer.lr_schedule[1]: must be at least 0 and at"),
        (["stages.transfer.decay_ratio=0"], "stages.transfer.decay_ratio: must be above 0 and at most 1"),
        (
            ["stages.transfer.tokens=8k", "stages.transfer.batch_size=[[0,8],[0.5,2]]"],
            "8000 is less than one optimizer step of batch_size 8 x data.length 1024 = 8192",
        ),
        (
            ["stages.recover.objective={dpo: 1}", "stages.recover.data={template: preference, source: p.jsonl, "
             "length: [64, 128]}"],
            "stages.recover.data.length: pairs have one length; give a number",
        ),
    ],
)  # fmt: skip
def test_single_mistakes_in_a_recipe(overrides: list[str], expected: str) -> None:
    if overrides[0].startswith("stages.recover.objective"):
        overrides = ["stages.recover.objective=null", *overrides]
    with pytest.raises(RecipeError) as caught:
        compose("lolcats", overrides)
    assert expected in str(caught.value)
    assert "1 problem\n" in str(caught.value), str(caught.value)


def test_a_recipe_keeps_its_schedules(tmp_path: Any) -> None:
    recipe = compose("lolcats", [
        f"{WINDOW}=[0.9,0.75,0.5]",
        "stages.transfer.batch_size=[[0,8],[0.1,16]]",
        "stages.transfer.data.length=[512,1024,4096]",
        "stages.transfer.lr_schedule=[[0,1],[0.5,0.1]]",
        "stages.recover.lr_schedule=wsd",
    ])  # fmt: skip
    file = tmp_path / "written.yaml"
    file.write_text(to_yaml(recipe))
    assert compose(file) == recipe
    assert recipe.data.of(recipe.stages["transfer"]).length == 4096
    assert compose(file).stages["transfer"].batch_size == [[0, 8], [0.1, 16]]
