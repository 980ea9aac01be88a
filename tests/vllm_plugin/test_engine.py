"""Greedy tokens in vLLM are those of `generate()`, however its scheduler cuts, holds, breaks off and resumes texts."""

from __future__ import annotations

import pytest
from served import NEW, VLLM, answers, churn, count, exported, lolcats

pytestmark = pytest.mark.skipif(
    not VLLM, reason="vllm is not installed; `make test-vllm` makes an environment"
)


def test_linear(start, linear):
    """A model without any softmax: prompts of all lengths at once, then 64, then texts that come and go."""
    llm = start(linear)
    assert answers(llm, linear.prompts) == linear.answers
    assert answers(llm, linear.prompts * 4) == linear.answers * 4
    ended, aborted = churn(llm, linear, 60, seed=1)
    assert ended > 30 and aborted > 5


def test_mixers(start, mixers):
    """Mixers by layer beside kept softmax: prompts in chunks of 32, and so few pages that texts give theirs up."""
    llm = start(mixers, max_num_batched_tokens=32, num_gpu_blocks_override=10)
    assert answers(llm, mixers.prompts) == mixers.answers
    # three begin in a block each beside two states, and none is left when they outgrow it
    growing = [row for row, prompt in enumerate(mixers.prompts) if 128 - NEW < len(prompt) < 128] * 4
    assert answers(llm, [mixers.prompts[row] for row in growing]) == [mixers.answers[row] for row in growing]
    assert count(llm, "vllm:num_preemptions") > 0
    ended, aborted = churn(llm, mixers, 60, seed=2)
    assert ended > 30 and aborted > 5


@pytest.mark.parametrize("layers", ["all", [0, 2]], ids=["linear", "hybrid"])
def test_long_prompts(start, tmp_path, layers):
    """In chunks, beside a short one that decodes meanwhile."""
    model = lolcats(layers, max_position_embeddings=4096)
    checkpoint = exported(model, tmp_path / "out", lengths=(3, 700, 1500, 3000))
    llm = start(checkpoint, max_model_len=4096, max_num_batched_tokens=256)
    assert answers(llm, checkpoint.prompts) == checkpoint.answers


@pytest.mark.parametrize("kind", ["linear", "mixers"])
def test_prefixes(start, kind, request):
    """A text whose beginning another one had goes on from the state that was kept there."""
    checkpoint = request.getfixturevalue(kind)
    llm = start(checkpoint, enable_prefix_caching=True, block_size=32, max_num_batched_tokens=64)
    assert answers(llm, checkpoint.prompts) == checkpoint.answers
    assert answers(llm, checkpoint.prompts) == checkpoint.answers
    assert count(llm, "vllm:prefix_cache_hits") > 0
    ended, _ = churn(llm, checkpoint, 40, seed=3)
    assert ended > 10


@pytest.mark.parametrize("eager", [True, False])
def test_processes(start, mixers, monkeypatch, eager):
    """An engine in a process of its own, which gets the config in a pickle; as it is, and compiled around layers."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    llm = start(mixers, enforce_eager=eager)
    assert answers(llm, mixers.prompts) == mixers.answers
