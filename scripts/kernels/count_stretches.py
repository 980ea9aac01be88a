"""Launches and bytes of log-linear attention's text form: all levels together, and one after the other.

    PYTHONPATH=. python scripts/kernels/count_stretches.py [--tokens 1024,65536]

Needs no GPU: launches of forward and backward are recorded and not made, of one text of one document in bfloat16 with
9 heads of 64, 10 levels and blocks of 16 tokens, the rule's own launches alone. Bytes a token are those of every tensor
of a launch, read or written once (states of all chunks: what the launch touches of them), so that several launches may
find some in a cache.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from linearize.kernels import dispatch, launch
from linearize.kernels.chunks import cut_documents
from linearize.kernels.stretches.chunk import Cut, Stretches
from linearize.mixers import LayerShape, State
from linearize.mixers.base import positions
from linearize.mixers.update import Stream, Update
from linearize.mixers.update.levels import Levels
from linearize.mixers.update.log_linear import LogLinear
from linearize.mixers.update.log_linear_delta import LogLinearDelta

HEADS, DIM, LEVELS, BLOCK, CHUNK = 9, 64, 10, 16, 64
RULES: dict[str, type[Any]] = {"gated delta": LogLinearDelta, "additive with decays": LogLinear}
STATES = ("states", "leaving")


def main() -> int:
    """Print a line of JSON for each rule, form and length."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="1024,65536", help="lengths, by commas")
    options = parser.parse_args()
    for tokens in (int(x) for x in options.tokens.split(",")):
        for name, kind in RULES.items():
            for joined in (True, False):
                made = recorded(kind, tokens, joined)
                touched = shares(tokens) if joined else {}
                size = sum(of_launch(each, touched) for each in made) / tokens
                found = {
                    "rule": name,
                    "form": "together" if joined else "apart",
                    "tokens": tokens,
                    "launches": len(made),
                    "bytes_a_token": round(size),
                    "kernels": dict(Counter(each.kernel.fn.__name__ for each in made)),
                }
                print(json.dumps(found), flush=True)
    return 0


def recorded(kind: type[Any], tokens: int, joined: bool) -> list[launch.Launch]:
    """Launches of a forward and backward pass."""

    def draw(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(1, tokens, *size, dtype=dtype, requires_grad=True)

    layer = LayerShape(HEADS, HEADS, DIM, DIM, 1.0, model_dim=1)
    rule: Update = kind(kind.Config(levels=LEVELS, block=BLOCK), HEADS, DIM, DIM, layer, running_sum=False)
    rule.decay = "head"
    rows = (draw(HEADS, DIM) for _ in range(3))
    docs = torch.zeros(1, tokens, dtype=torch.int64)
    hidden, log_decay = draw(1), draw(HEADS, dtype=torch.float32)
    stream = Stream(*rows, docs, docs == 0, log_decay, hidden=hidden, dtype=torch.bfloat16, fresh=True)
    with form(joined), dispatch.kernels("triton"), launch.record() as made:
        state = State(rule.initial(1, torch.float32, docs.device))
        rule.chunked(stream, state).numerator.float().sum().backward()
    return made


@contextmanager
def form(joined: bool) -> Iterator[None]:
    """Inside, levels are read together or apart."""
    before, Levels.joined = Levels.joined, joined
    try:
        yield
    finally:
        Levels.joined = before


def shares(tokens: int) -> dict[tuple[str, str], float]:
    """Kernel and its tensor of states -> how much of it is read or written, in parts of it."""
    docs = torch.zeros(1, tokens, dtype=torch.int64)
    place, _ = positions(docs == 0, docs, docs.new_zeros(1))
    older = tokens > BLOCK << LEVELS
    count = LEVELS + 1 if older else 1 + sum(BLOCK << level < tokens for level in range(LEVELS))
    blocks, stretches = cut_documents(docs, CHUNK), Stretches(BLOCK, count, older)
    cut = Cut.of(place, docs, docs.new_zeros(1), blocks, stretches)
    written = cut.written.any(-1)
    size = torch.tensor([BLOCK << level for level in range(count)] + [1 << 40] * older)
    carried = cut.carried & (cut.first[..., None] * BLOCK % size != 0)
    live = cut.live & (cut.first > 0)[..., None]
    part = {
        "write_kernel": {"states": written},
        "forward": {"states": written.float() + (carried | live)},
        "output_kernel": {"states": live},
        "reader_kernel": {"leaving": live},
        "backward": {"states": live.float() + (carried | written)},
        "value_gradient_kernel": {"leaving": carried | written, "states": carried},
        "weight_gradient_kernel": {"states": live},
    }
    return {(kernel, name): x.float().mean().item() for kernel, of in part.items() for name, x in of.items()}


def of_launch(each: launch.Launch, touched: dict[tuple[str, str], float]) -> float:
    """Bytes that it reads and writes."""
    kernel, total = each.kernel.fn.__name__, 0.0
    in_place = kernel == "states_kernel"
    if in_place:
        kernel = "backward" if each.arguments["REVERSE"] else "forward"
    for name, x in each.arguments.items():
        if isinstance(x, Tensor):
            often = touched.get((kernel, name), 2.0 if in_place and name in STATES else 1.0)
            total += often * x.numel() * x.element_size()
    return total


if __name__ == "__main__":
    raise SystemExit(main())
