"""Memory that a kernel forgets to write must show: what `torch.empty` gives is NaN in these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kernel_calls import poisoned


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    with poisoned():
        yield
