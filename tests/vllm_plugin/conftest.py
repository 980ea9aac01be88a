"""Checkpoints, and vLLM itself, in this process and on the CPU."""

from __future__ import annotations

import gc
import os

import mixed
import pytest
from served import WIDE, Checkpoint, exported, lolcats


@pytest.fixture(scope="session")
def linear(tmp_path_factory) -> Checkpoint:
    """Nothing softmax is left."""
    return exported(lolcats(), tmp_path_factory.mktemp("linear") / "out")


@pytest.fixture(scope="session")
def mixers(tmp_path_factory) -> Checkpoint:
    """Six layers, five kinds: recurrence with convolution and gate, windows, softmax kept, softmax by a mixer."""
    return exported(mixed.mixed(**WIDE), tmp_path_factory.mktemp("mixers") / "out")


@pytest.fixture(scope="module")
def start():
    """Starts vLLM on a checkpoint; the one before it goes."""
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    from vllm import LLM

    held: list[LLM] = []

    def started(checkpoint: Checkpoint, **options) -> LLM:
        held.clear()
        gc.collect()
        settings = {
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "max_model_len": 256,
            "max_num_seqs": 8,
            "dtype": "float32",
            "disable_log_stats": False,
            "enable_prefix_caching": False,
        }
        held.append(LLM(str(checkpoint.path), **{**settings, **options}))
        return held[0]

    yield started
    held.clear()
