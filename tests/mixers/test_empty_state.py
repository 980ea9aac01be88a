"""A state that was just made is not read (`State.empty`): the call gives what it gives if an empty one is read."""

from __future__ import annotations

import pytest
import torch
from compositions import SHAPES, Draw, label, make, registered
from rounding import close

from linearize.mixers.state import State

TOKENS = (2, 3, 12, 40)
"""Fewer than are pinned, fewer than the window holds, more."""
WINDOWED = [one for one in registered() if one.get("window", {}).get("name", "none") not in ("none", "full")]


def masks(kind: str, tokens: int) -> dict[str, torch.Tensor]:
    """Of one call: nothing, padding in front, or documents that begin inside."""
    if kind == "whole":
        return {}
    valid, starts = torch.ones(2, tokens, dtype=torch.bool), torch.zeros(2, tokens, dtype=torch.bool)
    valid[0, : tokens // 2] = False
    starts[1, tokens // 3] = True
    return {"valid": valid} if kind == "padded" else {"starts": starts}


@pytest.mark.parametrize("kind", ["whole", "padded", "packed"])
@pytest.mark.parametrize("mixer", WINDOWED, ids=label)
def test_what_is_not_read_is_not_missed(mixer, kind):
    shape = SHAPES["grouped"]
    made = make(mixer, shape, torch.float64)
    for tokens in TOKENS:
        x, more = (Draw.of(shape, count, torch.float64, seed=count) for count in (tokens, 9))
        given = masks(kind, tokens)
        found = []
        for empty in (False, True):
            state = made.initial_state(2, torch.float64, x.q.device)
            state.empty = empty
            with torch.no_grad():
                parts = [x.run(made.chunked, state=state, **given)]
                state.empty = False
                parts += [more[t : t + 1].run(made.step, state=state) for t in range(3)]
                parts.append(more[3:].run(made.chunked, state=state))
            found.append(torch.cat(parts, 1))
            if "window_since" in state:
                found.append(state["window_since"].double())
        here = given.get("valid", torch.ones(2, tokens, dtype=torch.bool))
        half = len(found) // 2
        for expected, out in zip(found[:half], found[half:], strict=True):
            if out.dim() > 1:
                out[:, :tokens][~here] = expected[:, :tokens][~here]  # which is nobody's
            close(out, expected)


def test_only_the_call_that_makes_a_state_says_that_it_is_empty():
    """A state that was filled by other means, as one that was read from a file, must be read."""
    assert State({}).empty is False
