"""Recording a CUDA graph, such that a recording that fails leaves nothing behind.

torch leaves the current stream, the random generator and the allocator in the middle of a recording that failed, and
every later use of them fails too (torch 2.11 to 2.13: `CUDAGraph.capture_end` raises before it tidies up).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

Made = TypeVar("Made")


def record(call: Callable[[], Made]) -> tuple[torch.cuda.CUDAGraph, Made]:
    """The graph of what `call` launches on the current device, and what it gives; nothing is computed yet.

    Args:
        call: has run before, so that everything is compiled and allocated that ever will be.

    Raises:
        Exception: what `call` raised, or torch's error of an operation that cannot be recorded.
    """
    stream, device = torch.cuda.current_stream(), torch.cuda.current_device()
    generator = torch.cuda.default_generators[device]
    random = generator.clone_state()
    graph = torch.cuda.CUDAGraph()
    cause: Exception | None = None
    try:
        # other threads, such as the one that pins batches, may go on
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            try:
                made = call()
            except Exception as error:
                cause = error
                raise
    except Exception as error:
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(random)
        with suppress(RuntimeError, AttributeError, TypeError):
            torch._C._cuda_endAllocateToPool(device, graph.pool())
        raise (cause or error) from None
    return graph, made
