"""What a compiled mixer keeps for backward: less than torch would, and nothing that hangs on the text twice over."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from linearize.bench.subjects import mixers_of
from linearize.mixers import build

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "kernels" / "saved_bytes.py"
MOST = {"arwkv": 17_000, "gated_delta_window": 11_000, "gated_deltaproduct": 16_500, "lolcats": 6_000}
"""Bytes a token and layer; at 16 x 1,024 tokens and 30 layers 1,000 of them are half a GiB. Of arwkv's 384 are the
values before they are mixed with the first layer's."""
QUICK = ("lolcats",)
"""Of them, what is compiled at every change: seconds each, in three ways."""


@pytest.fixture
def script():
    found = importlib.util.spec_from_file_location("saved_bytes", SCRIPT)
    assert found is not None and found.loader is not None
    made = importlib.util.module_from_spec(found)
    found.loader.exec_module(made)
    return made


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MOST]
)
def test_a_compiled_mixer_keeps_little(script, name):
    mixer = build(mixers_of(name)[0], script.SHAPE)
    whole, little = (script.per_token(mixer, way) for way in ("compiled", "keeping little"))
    # either there is much to leave out, or a few masks at most
    assert little <= MOST[name] and (little < 0.8 * whole or 0.99 * whole < little <= whole)
    # what the branches read and the output is there in any case
    assert little > 2 * 64 * (9 + 3 + 3 + 9)
