"""Recording a CUDA graph, such that a recording that fails leaves nothing behind.

torch leaves the current stream, the random generator and the allocator in the middle of a recording that failed, and
every later use of them fails too (torch 2.11 to 2.13: `CUDAGraph.capture_end` raises before it tidies up).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")


def record(
    call: Callable[[], Made], beside: torch.cuda.CUDAGraph | None = None
) -> tuple[torch.cuda.CUDAGraph, Made]:
    """The graph of what `call` launches on the current device, and what it gives; nothing is computed yet.

    Args:
        call: has run before, so that everything is compiled and allocated that ever will be.
        beside: a graph whose memory this one uses as well, such that together they hold about what the larger needs.
            Neither may be replayed while what the other made is still to be read.

    Raises:
        Exception: what `call` raised, or torch's error of an operation that cannot be recorded.
    """
    stream, device = torch.cuda.current_stream(), torch.cuda.current_device()
    generator = torch.cuda.default_generators[device]
    random = generator.clone_state()
    graph = torch.cuda.CUDAGraph()
    # of a graph whose recording failed torch does not tell the pool
    pool: Any = torch.cuda.graph_pool_handle() if beside is None else beside.pool()
    cause: Exception | None = None
    try:
        # other threads, such as the one that pins batches, may go on
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            try:
                made = call()
            except Exception as error:
                cause = error
                raise
    except Exception as error:
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(random)
        with suppress(RuntimeError, AttributeError, TypeError):
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        try:
            raise (cause or error) from None
        finally:
            del cause  # with its frames, and what the recording had taken
    return graph, made
