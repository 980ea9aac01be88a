"""One token that looks back on many keys: kernels of kept softmax layers and of windows, beside the bytes they read.

    python scripts/kernels/time_looking_back.py --out DIR [--tune] [--turn FILE]

A row of JSON for each size: milliseconds of a call in a recorded graph, in which calls go round as many rings as do not
fit into the device's cache, and `floor`, the keys and values that are seen, read once at 4.25 TB/s (an H200's copy).
`--tune` then goes through bytes in a tile, stages and programs to a multiprocessor at the sizes that matter.

Predicted for the sizes of SmolLM2-135M at 64 x 8,192 (before any was seen): 0.105 ms of a kept softmax layer (floor
0.095), 0.11 of a ring of as many; transformers' attention takes 0.80 there, the kernel that one program ran for a query
head 0.37. A window of 2,048: 0.035 (0.024); of 128 and 4 pinned 0.009; of 64 and 4 pinned 0.006; at batch 1 0.012.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.kernels import dispatch, sharing
from linearize.kernels.newest import newest_step
from linearize.kernels.window.recurrent import Held

BANDWIDTH = 4.25e12
CACHED = 200 * 2**20
"""Bytes of rings that are gone round."""
SIZES = {
    "newest, 64 x 8,192": ("newest", 64, 9, 3, 64, 8497, 8193, 0),
    "window, 64 x 8,192": ("window", 64, 9, 3, 64, 8498, 8193, 0),
    "newest, 1 x 8,192": ("newest", 1, 9, 3, 64, 8497, 8193, 0),
    "window, 64 x 2,048 + 4": ("window", 64, 9, 3, 64, 2049, 2048, 4),
    "window, 64 x 128 + 4": ("window", 64, 9, 3, 64, 129, 128, 4),
    "window, 64 x 64 + 4": ("window", 64, 9, 3, 64, 65, 64, 4),
    "window, 1 x 8,192": ("window", 1, 9, 3, 64, 8498, 8193, 0),
    "newest, 16 x 8,192, Llama-3-8B": ("newest", 16, 32, 8, 128, 8497, 8193, 0),
}
"""Kernel, batch, query heads, key heads, columns, slots, keys that are seen, pinned keys."""
TUNED = ("newest, 64 x 8,192", "window, 64 x 8,192", "newest, 1 x 8,192")
CHOICES = {"TILE": (16_384, 8192), "STAGES": (3, 2, 4), "WAVES": (4, 8)}


def main(arguments: list[str] | None = None) -> int:
    """Time, print and write rows as they come."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of looking-back.json")
    parser.add_argument("--tune", action="store_true", help="other configurations too")
    parser.add_argument(
        "--turn", type=Path, help="a file that processes who share the device lock while they time"
    )
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    own = {name: getattr(sharing, name) for name in CHOICES}
    others = (
        [dict(zip(CHOICES, x, strict=True)) for x in itertools.product(*CHOICES.values())]
        if options.tune
        else []
    )
    todo = [(name, own) for name in SIZES]
    todo += [(name, chosen) for name in TUNED for chosen in others if chosen != own]
    for name, chosen in todo:
        for constant, value in chosen.items():
            setattr(sharing, constant, value)
        row: dict[str, Any] = {"size": name, **{x.lower(): y for x, y in chosen.items()}}
        try:
            row |= timed(name, options.turn)
        except (RuntimeError, dispatch.KernelError) as error:
            row["note"] = " ".join(str(error).split())[:200]
        torch.cuda.empty_cache()
        rows.append(row)
        print(json.dumps(row), flush=True)
        (options.out / "looking-back.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def timed(name: str, turn: Path | None) -> dict[str, Any]:
    """Milliseconds of a call, its floor, and how far it is from the same in float32 by torch."""
    kind, batch, heads, held, width, slots, sees, first = SIZES[name]
    seen = 2 * 2 * batch * held * width * (sees + first)
    rings = max(2, -(-CACHED // seen))
    calls = [made(kind, batch, heads, held, width, slots, sees, first, seed) for seed in range(rings)]
    apart = calls[0]()
    graph = torch.cuda.CUDAGraph()
    for call in calls:
        call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    rounds = max(3, 200 // rings)
    with nullcontext() if turn is None else locked(turn):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
        graph.replay()
        marks[0].record()
        for mark in marks[1:]:
            graph.replay()
            mark.record()
        torch.cuda.synchronize()
    spans = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    return {
        "milliseconds": round(spans[len(spans) // 2] / rings, 5),
        "floor": round(1e3 * seen / BANDWIDTH, 5),
        "apart": apart,
        "rings": rings,
    }


def made(
    kind: str, batch: int, heads: int, held: int, width: int, slots: int, sees: int, first: int, seed: int
) -> Callable[[], float | None]:
    """A call over a ring of its own; called for the first time of seed 0 it says how far it is from torch."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)

    q, asked = normal(batch, heads, width), [seed == 0]
    if kind == "newest":
        keys, values = normal(batch, held, slots, width), normal(batch, held, slots, width)
        newest = torch.full((batch,), sees - 1, device="cuda")
        given = (keys, values, newest, newest + 1)

        def call() -> float | None:
            out = newest_step(q, *given, scaling=width**-0.5)
            return far(out, q, keys, values, sees) if asked and asked.pop() else None

        return call
    from linearize.kernels.window.triton_step import window_step_triton

    keys, values = normal(batch, first + slots, held, width), normal(batch, first + slots, held, width)
    valid = torch.zeros(batch, first + slots, dtype=torch.bool, device="cuda")
    valid[:, : first + sees] = True
    places = torch.full((batch, heads), sees, dtype=torch.int64, device="cuda")
    ring = Held(keys, values, valid, places, first)
    token = normal(batch, 1, held, width), normal(batch, 1, held, width)
    here = torch.ones(batch, 1, dtype=torch.bool, device="cuda")

    def step() -> float | None:
        look = bool(asked and asked.pop())
        before = (keys.clone(), values.clone()) if look else None
        options: dict[str, Any] = {"valid": here, "span": slots - 1, "scaling": width**-0.5}
        out, *_ = window_step_triton(q[:, None], *token, ring, **options)
        if before is None:
            return None
        # the token's own key takes the slot of one that is not seen any more, or a free one
        near = slice(first + max(0, sees + 2 - slots), first + sees)
        seen = [
            torch.cat([x[:, :first], x[:, near], own], 1).transpose(1, 2)
            for x, own in zip(before, token, strict=True)
        ]
        return far(out[:, 0], q, *seen, seen[0].shape[2])

    return step


def far(out: Tensor, q: Tensor, keys: Tensor, values: Tensor, sees: int) -> float:
    """Largest difference from torch in float32."""
    group = q.shape[1] // keys.shape[1]
    keys, values = (x[:, :, :sees].float().repeat_interleave(group, 1) for x in (keys, values))
    scores = torch.einsum("bhk,bhsk->bhs", q.float(), keys) * q.shape[2] ** -0.5
    right = torch.einsum("bhs,bhsv->bhv", scores.softmax(-1), values)
    return round(float((out.float() - right).abs().max()), 6)


def locked(path: Path) -> Any:
    """A lock on a file."""
    from filelock import FileLock

    return FileLock(path)


if __name__ == "__main__":
    raise SystemExit(main())
