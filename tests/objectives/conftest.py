"""The calls that layer objectives are tested on."""

from __future__ import annotations

import pytest
from quadratic import QuadraticCall, make_call


@pytest.fixture(params=[False, True], ids=["whole", "padded"])
def call(request: pytest.FixtureRequest) -> QuadraticCall:
    """A call without and with padding."""
    return make_call(padded=request.param)
