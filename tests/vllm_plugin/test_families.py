"""Every family that the plugin is promised for: converted layers beside kept ones, against `generate()`."""

from __future__ import annotations

import pytest
from served import VLLM, answers, exported, lolcats

pytestmark = pytest.mark.skipif(
    not VLLM, reason="vllm is not installed; `make test-vllm` makes an environment"
)

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "smollm3", "olmo2", "granite",
    "starcoder2", "mixtral", "qwen3_moe",
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_family(start, tmp_path, family):
    # tied to their scaled embeddings, the random Gemmas only say the last token again
    model = lolcats([0, 2], family, **{"tie_word_embeddings": False} if "gemma" in family else {})
    checkpoint = exported(model, tmp_path / "out", lengths=(1, 3, 20, 61, 100))
    assert answers(start(checkpoint), checkpoint.prompts) == checkpoint.answers
