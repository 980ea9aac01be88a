"""Groups of lm-eval's tasks in a folder of one's own: what is wrong is told with file and line, all of it at once."""

from __future__ import annotations

import pytest

from linearize.errors import LinearizeError
from linearize.eval.lm_tasks import suite

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("own_tasks_once")

TASK = (
    "task: {}\ndataset_path: json\ndataset_kwargs: {{data_files: items.jsonl}}\ndoc_to_text: !function f.f\n"
)


@pytest.fixture
def named(tmp_path):
    """Names of tasks, and the files of the folder as text, to what is said."""

    def check(names: str, **files: str) -> str:
        folder = tmp_path / f"tasks{len(list(tmp_path.iterdir()))}"  # a folder is read once
        folder.mkdir()
        (folder / "mine_a.yaml").write_text(TASK.format("mine_a") + "tag: [mine_tag]\n")
        for name, text in files.items():
            (folder / f"{name}.yaml").write_text(text)
        try:
            suite(names.split(","), shots=None, limit=0, include=folder, data=None)
        except LinearizeError as error:
            return str(error).replace(f"{folder}/", "")
        return ""

    return check


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "task:\n  - mine_a\n  - mine_bb\n",
            "mine.yaml, line 4: there is no task 'mine_bb'; did you mean 'mine_a'?",
        ),
        ("task: [hellaswagg]", "mine.yaml, line 2: there is no task 'hellaswagg'; did you mean 'hellaswag'?"),
        (
            "task:\n  - {task: mine_aa, num_fewshot: 1}",
            "line 3: there is no task 'mine_aa'; did you mean 'mine_a'?",
        ),
        ("task:\n  - group: inner\n    task:\n    - mine_c\n", "line 5: there is no task 'mine_c'"),
        ("task: [zzzzzzzzzzzz]", "there is no task 'zzzzzzzzzzzz'; `lm_eval ls tasks` lists"),
        ("task: mine_a", "line 2: `task` of a group is a list of names; write [mine_a]"),
        ("task:\n  - [mine_a]\n", "line 3: a group holds names, or {task: NAME} and"),
        ("task:\n  - {num_fewshot: 1}\n", "line 3: a group holds names, or {task: NAME} and"),
        ("task: [mine]", "line 2: group 'mine' leads back to itself"),
    ],
)
def test_what_is_wrong_in_a_group(named, text, said):
    found = named("mine", mine=f"group: mine\n{text}")
    assert "--include-path: 1 problem\n" in found and said in found


def test_all_at_once_and_below_other_groups(named):
    below = "group: below\ntask: [mine_b, above]\n"
    found = named(
        "above,mine_a", above="group: above\ntask:\n- below\n- mine_c\n- {group: below}\n", below=below
    )
    assert found.count("\n") == 3 and "3 problems" in found
    assert "below.yaml, line 2: there is no task 'mine_b'" in found and "above.yaml, line 4: there" in found
    assert "below.yaml, line 2: group 'above' leads back to itself" in found
    assert named("mine_a", below=below) == ""  # nobody asked for it


def test_files_that_are_passed_over(named):
    gone = "task: mine_b\ninclude: mine_aa.yaml\n"
    said = "b.yaml, line 2: 'mine_b' includes mine_aa.yaml, which is no file, so that lm-eval passes over it"
    assert f"{said}; did you mean 'mine_a.yaml'?" in named("mine_b", b=gone)
    found = named("mine", b=gone, mine="group: mine\ntask: [mine_b]\n")
    assert f"mine.yaml, line 2: there is no task 'mine_b'; {said}" in found
    assert "b.yaml, line 1: 'tsak' makes no task of 'mine_b'; did you mean 'task'?" in named(
        "mine_b", b="tsak: mine_b"
    )
    assert "lm-eval has no task 'mine_b'; did you mean 'mine_a'?" in named("mine_b", b="doc_to_text: mine_c")


def test_what_lm_eval_takes_is_taken(named):
    """Tags, lm-eval's own groups, tasks that are defined where they stand, and what the group gives to its tasks."""
    whole = "group: mine\ntask:\n- mine_a\n- mine_tag\n- arc_easy\n- mmlu_stem\n- {task: new, dataset_path: json}\n"
    assert named("mine,mine_tag,arc_easy", mine=f"{whole}- group: inner\n  task: [mine_a]\n") == ""
    assert named("mine", mine="group: mine\ndataset_path: json\ntask: [one, two]\n") == ""
    assert named("mine", mine="group: mine\ninclude: mine_a.yaml\ntask: [one, two]\n") == ""
