"""Two processes with half the heads each: greedy tokens in vLLM are those of `generate()`."""

from __future__ import annotations

import mixed
import pytest
from served import VLLM, WIDE, answers, exported, lolcats

pytestmark = pytest.mark.skipif(
    not VLLM, reason="vllm is not installed; `make test-vllm` makes an environment"
)


@pytest.fixture(autouse=True)
def processes(monkeypatch):
    """vLLM starts the two by itself, and would bind each to a core of its own."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def test_mixers(start, mixers):
    """Mixers by layer beside kept softmax, two heads of keys and values for two processes."""
    llm = start(mixers, tensor_parallel_size=2, max_num_batched_tokens=32)
    assert answers(llm, mixers.prompts) == mixers.answers


def test_one_head_of_keys(start, tmp_path):
    """Both processes hold the one key-value head, in states as in kept layers' pages."""
    checkpoint = exported(
        mixed.mixed(num_key_value_heads=1, **WIDE), tmp_path / "out", lengths=(1, 3, 33, 100)
    )
    llm = start(checkpoint, tensor_parallel_size=2)
    assert answers(llm, checkpoint.prompts) == checkpoint.answers


@pytest.mark.parametrize(("family", "layers"), [("olmo2", [0, 2]), ("phi3", "all")])
def test_projections_that_are_whole(start, tmp_path, family, layers):
    """OLMo 2's queries and keys are made whole in every process, for its norms, and Phi-3's as they are packed."""
    checkpoint = exported(lolcats(layers, family), tmp_path / "out", lengths=(1, 3, 33, 100))
    llm = start(checkpoint, tensor_parallel_size=2)
    assert answers(llm, checkpoint.prompts) == checkpoint.answers
