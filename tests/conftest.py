"""Triton's kernels run in its interpreter where there is no GPU; it has to be chosen before they are defined.

And the check of an export runs in the test's own process, since starting another takes seconds.
"""

from __future__ import annotations

import os
import re

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def packed_apart(monkeypatch, tmp_path_factory):
    """Tokenized text of a test is kept for that test alone."""
    from linearize.data import store

    made = []

    def folder():
        if not made:
            made.append(tmp_path_factory.mktemp("cache"))
        return made[0]

    monkeypatch.setattr(store, "cache_dir", folder)


@pytest.fixture(autouse=True)
def check_in_this_process(monkeypatch):
    """Compare an export with its model here; `tests/export/test_verify.py` has it done in a fresh process."""
    from linearize.export import reloading, verify

    monkeypatch.setattr(
        verify, "in_new_process", lambda settings, work: reloading.compare(settings, package=True)
    )


SLOW = (
    "tests/kernels/test_aot.py::test_kernels_compile_within_the_limits",
    "tests/sample/test_writer.py::test_each_document_is_the_models_own[gemma2-True",
    "tests/sample/test_writer.py::test_each_document_is_the_models_own[llama-True",
    "tests/test_recipes.py::test_on_the_real_teacher[gated_deltanet",
    "tests/test_cli_select.py::test_a_run_takes_the_recipe",
    "tests/test_comparisons.py::test_a_leaderboard_of_one_recipe_and_the_window",
    "tests/distill/test_kill_everywhere.py::test_killed_at_every_operation",
    "tests/test_stopped.py::test_stopped_anywhere",
    "tests/mixers/test_compiled.py::test_compiled_equals_the_parts[gdn2",
    "tests/mixers/test_compiled.py::test_compiled_equals_the_parts[levels",
    "tests/mixers/test_compiled.py::test_compiled_equals_the_parts[mesa",
    "tests/mixers/test_compiled.py::test_compiled_equals_the_parts[start and angles",
    "tests/test_bench.py::test_ours_runs_both_ways_and_is_right[window_",
    "tests/test_bench_train.py::test_every_stage_beside_the_softmax_model",
    "tests/test_bench_recipes.py::test_rows_of_training_and_what_was_measured_before_stay",
    "tests/test_bench_decode_recipes.py::test_processes_share_a_folder_and_take_turns",
    "tests/distill/test_texts.py::test_resumed_it_reads_the_same",
    "tests/mixers/test_fused.py::test_padding_between_tokens_equals_the_parts",
    "tests/mixers/test_learned_start.py::test_kernels_give_what_the_parts_do[gdn2",
    "tests/mixers/test_learned_start.py::test_kernels_give_what_the_parts_do[delta kda",
    "tests/eval/test_lm_tasks.py::test_scores_are_those_of_lm_eval[1",
)
"""Beginnings of the ids of tests that take ten seconds of a processor or more and have cheaper kin beside them."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them slow, and the kernels' tests in float16 on Triton's interpreter; a machine with a GPU runs those."""
    interpreted = not torch.cuda.is_available()
    for item in items:
        narrow = item.nodeid.startswith("tests/kernels/") and bool(re.search(r"(?<!b)float16", item.nodeid))
        if item.nodeid.startswith(SLOW) or (interpreted and narrow):
            item.add_marker("slow")
