"""Greedy tokens in vLLM are those of `generate()`, however its scheduler cuts, holds, breaks off and resumes texts."""

from __future__ import annotations

import random

import pytest
from served import NEW, VLLM, Checkpoint

pytestmark = pytest.mark.skipif(
    not VLLM, reason="vllm is not installed; `make test-vllm` makes an environment"
)


def greedy(tokens: int = NEW):
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def answers(llm, prompts: list[list[int]], tokens: int = NEW) -> list[list[int]]:
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [list(made.outputs[0].token_ids) for made in llm.generate(asked, greedy(tokens), use_tqdm=False)]


def count(llm, name: str) -> float:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def churn(llm, checkpoint: Checkpoint, texts: int, seed: int) -> tuple[int, int]:
    """Random arrivals, lengths and aborts; every answer that ends is checked. How many ended, and how many not."""
    engine, dice = llm.llm_engine, random.Random(seed)
    asked: dict[str, tuple[int, int]] = {}
    made = ended = aborted = 0
    while made < texts or asked:
        while made < texts and dice.random() < 0.5:
            which, tokens = dice.randrange(len(checkpoint.prompts)), dice.choice([1, 2, NEW, NEW])
            name = f"{seed}-{made}"
            engine.add_request(name, {"prompt_token_ids": checkpoint.prompts[which]}, greedy(tokens))
            asked[name], made = (which, tokens), made + 1
        if asked and dice.random() < 0.15:
            name = dice.choice(list(asked))
            engine.abort_request([name])
            del asked[name]
            aborted += 1
        for output in engine.step():
            if output.finished and output.request_id in asked:
                which, tokens = asked.pop(output.request_id)
                assert list(output.outputs[0].token_ids) == checkpoint.answers[which][:tokens], (
                    output.request_id
                )
                ended += 1
    return ended, aborted


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
