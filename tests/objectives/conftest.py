"""The calls that layer objectives are tested on."""

from __future__ import annotations

import pytest
from quadratic import QuadraticCall, make_call

from linearize.objectives import matrices


@pytest.fixture(params=[False, True], ids=["whole", "padded"])
def call(request: pytest.FixtureRequest) -> QuadraticCall:
    """A call without and with padding."""
    return make_call(padded=request.param)


@pytest.fixture(autouse=True)
def of_quadratic_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quadratic call has no mixer to ask; it makes its terms itself."""
    own = matrices.terms

    def terms(call, kind):
        return call.terms(kind) if isinstance(call, QuadraticCall) else own(call, kind)

    monkeypatch.setattr(matrices, "terms", terms)
