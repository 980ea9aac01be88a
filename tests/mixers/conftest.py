"""Where mixers run on kernels that are compiled, memory that one forgets to write must show, as in tests/kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kernel_calls import ON_GPU, poisoned

if ON_GPU:

    @pytest.fixture(autouse=True)
    def poisoned_memory() -> Iterator[None]:
        with poisoned():
            yield
