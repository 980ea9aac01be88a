"""Every composition by heads: what the processes of a tensor-parallel group make is what one makes of all heads."""

from __future__ import annotations

import compositions
import pytest
import torch
from compositions import Draw, label, registered

from linearize.errors import UnsupportedModelError
from linearize.mixers import LayerShape
from linearize.serve.vllm.heads import cut, problem, repeated, share, shared_out

SHAPE = LayerShape(heads=4, kv_heads=2, key_dim=8, value_dim=6, scaling=8**-0.5, model_dim=10)


def part(section: dict, whole, rank: int, ranks: int):
    """What a process holds, filled as vLLM's loader fills it."""
    made = shared_out(section, whole, rank, ranks).to(torch.float64)
    of, runs = dict(whole.named_parameters()), repeated(made)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(cut(of[name], tuple(parameter.shape), rank, ranks, runs.get(name, 1)))
    return made


def given(drawn: Draw, rank: int, ranks: int) -> Draw:
    """The inputs of a process's heads; all of the hidden states."""
    shape = share(SHAPE, ranks)

    def own(x: torch.Tensor) -> torch.Tensor:
        heads = shape.heads if x.shape[2] == SHAPE.heads else shape.kv_heads
        return cut(x, (*x.shape[:2], heads, x.shape[3]), rank, ranks)

    plain = (own(drawn.plain[0]), own(drawn.plain[1]))
    return Draw(own(drawn.q), own(drawn.k), own(drawn.v), drawn.hidden, plain, own(drawn.first))


@pytest.mark.parametrize("section", list(map(compositions.small, registered())), ids=label)
@torch.no_grad()
def test_heads(section):
    """Two processes split key-value heads, four hold each of them twice."""
    whole = compositions.make(section, SHAPE, torch.float64)
    drawn = Draw.of(SHAPE, 13, torch.float64)
    expected = drawn.run(whole.chunked)
    for ranks in (2, 4):
        outs = []
        for rank in range(ranks):
            own, inputs = part(section, whole, rank, ranks), given(drawn, rank, ranks)
            kept = own.initial_state(2, torch.float64, torch.device("cpu"))
            first = inputs[:12].run(own.chunked, state=kept)
            outs.append(torch.cat([first, inputs[12:].run(own.step, state=kept)], 1))
            assert own.state_bytes() <= whole.state_bytes()
        torch.testing.assert_close(torch.cat(outs, 2), expected, rtol=1e-8, atol=1e-8)


def test_state():
    """A process holds its heads' states and no others'."""
    section = compositions.small({"feature_map": compositions.HEDGEHOG})
    whole = compositions.make(section, SHAPE, torch.float64)
    assert [shared_out(section, whole, 0, ranks).state_bytes() for ranks in (2, 4)] == [
        whole.state_bytes() // 2,
        whole.state_bytes() // 4,
    ]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "found"),
    [
        (4, 2, 2, None),
        (4, 2, 4, None),
        (9, 3, 3, None),
        (9, 3, 9, None),
        (9, 3, 2, "9 query heads over 3 of keys and values cannot be shared out evenly; take 1, 3 or 9"),
        (12, 4, 3, "take 1, 2, 4 or 12"),
        (4, 2, 8, "tensor_parallel_size is 8"),
        (7, 1, 2, "take 1 or 7"),
    ],
)
def test_refused(heads, kv_heads, ranks, found):
    """Half a head, or a key-value head that the neighbours' query heads look at, is on no process."""
    shape = LayerShape(heads, kv_heads, 8, 8, 0.3)
    if found is None:
        assert problem(shape, ranks) is None
        return
    assert found in (problem(shape, ranks) or "")
    with pytest.raises(UnsupportedModelError, match=f"tensor_parallel_size is {ranks}"):
        share(shape, ranks)
