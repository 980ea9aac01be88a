"""Time window_linear's kernels one by one, and check them against float64, on a CUDA device.

    python scripts/kernels/profile_window_linear.py [--dim 64] [--window 64] [--tokens 8192] [--batch 8] [--heads 16]
        [--kv_heads 16] [--pins 0] [--config KERNEL=VALUES,WARPS,STAGES,REGISTERS ...]

Every launch gets its own pair of CUDA events; the median of twelve passes is printed, with the sums that make a forward
and a backward pass, and written to $OUT (default: runs/profile).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from linearize.kernels import dispatch
from linearize.kernels.window_linear import Pins, launches, plan, window_linear

PASSES = 12
FORWARD = {"key_states_kernel", "output_kernel", "aligned_output_kernel"}


def inputs(
    batch: int, tokens: int, heads: int, dim: int, features: int = 64, kv_heads: int = 0
) -> list[Tensor]:
    """q, k, v in bfloat16, two maps and the window's shares, all with gradients."""
    torch.manual_seed(0)
    each = (heads, kv_heads or heads, kv_heads or heads)
    made = [torch.randn(batch, tokens, n, dim, device="cuda", dtype=torch.bfloat16) for n in each]
    made += [0.1 * torch.randn(heads, dim, features, device="cuda") for _ in range(2)]
    made.append(torch.rand(heads, device="cuda"))
    return [x.requires_grad_() for x in made]


def call(tensors: list[Tensor], window: int, pins: int = 0) -> Tensor:
    """Of one document, whose first tokens are pinned."""
    q, k, v, query_map, key_map, share = tensors
    scaling = q.shape[-1] ** -0.5
    codes = pinned = None
    if pins:
        codes = torch.zeros(q.shape[:2], dtype=torch.int32, device=q.device)
        pinned = Pins(pins, codes, torch.where(torch.arange(q.shape[1], device=q.device) < pins, -1, codes))
    out, _ = window_linear(
        q, k, v, query_map, key_map, window=window, scaling=scaling, window_weight=share if window else None,
        codes=codes, pins=pinned,
    )  # fmt: skip
    return out


def errors(window: int, dim: int, pins: int = 0) -> dict[str, float]:
    """Relative errors of the output and of every gradient against the torch form in float64."""
    tensors = inputs(2, 777, 4, dim)
    names = ["q", "k", "v", "query_map", "key_map", "window_weight"][: 6 if window else 5]
    grad = torch.randn(2, 777, 4, dim, device="cuda", dtype=torch.bfloat16)

    def results(given: list[Tensor], form: str) -> list[Tensor]:
        with dispatch.kernels(form):
            out = call(given, window, pins)
        return [out, *torch.autograd.grad(out, given[: len(names)], grad.to(out.dtype))]

    exact = results([x.detach().double().requires_grad_() for x in tensors], "torch")
    ours = results(tensors, "triton")
    pairs = zip(["out", *names], ours, exact, strict=True)
    return {name: ((one.double() - two).norm() / two.norm()).item() for name, one, two in pairs}


def profile(tensors: list[Tensor], window: int, pins: int = 0) -> dict[str, float]:
    """Milliseconds of each kernel in one forward and backward pass."""
    records: list[tuple[str, Any, Any]] = []
    plain = launches.launch

    def timed(kernel: Any, grid: tuple[int, ...], /, **arguments: Any) -> None:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        plain(kernel, grid, **arguments)
        after.record()
        records.append((kernel.fn.__name__, before, after))

    launches.launch = timed
    try:
        grad = torch.randn_like(tensors[0])
        call(tensors, window, pins).backward(grad)
        found: dict[str, list[float]] = {}
        for _ in range(PASSES):
            records.clear()
            call(tensors, window, pins).backward(grad)
            torch.cuda.synchronize()
            one: dict[str, float] = {}
            for name, before, after in records:
                one[name] = one.get(name, 0.0) + before.elapsed_time(after)
            for name, time in one.items():
                found.setdefault(name, []).append(time)
    finally:
        launches.launch = plain
    return {name: median(times) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("dim", 64), ("window", 64), ("tokens", 8192), ("batch", 8), ("heads", 16),
                          ("kv_heads", 0), ("pins", 0)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--config", nargs="*", default=[], metavar="KERNEL=VALUES,WARPS,STAGES,REGISTERS")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this times kernels on one")
    for given in options.config:
        name, _, numbers = given.partition("=")
        plan.CONFIGS[name] = dict.fromkeys((64, 128, 256), plan.Config(*(int(x) for x in numbers.split(","))))
    wrong = errors(options.window, options.dim, options.pins)
    drawn = inputs(
        options.batch, options.tokens, options.heads, options.dim, kv_heads=options.kv_heads or options.heads
    )
    times = profile(drawn, options.window, options.pins)
    forward = sum(time for name, time in times.items() if name in FORWARD)
    print(
        "relative errors against float64: "
        + ", ".join(f"{name} {value:.1e}" for name, value in wrong.items())
    )
    for name, time in times.items():
        print(f"{name.removesuffix('_kernel'):28} {time:7.3f} ms")
    print(f"{'forward (without carries)':28} {forward:7.3f} ms\n{'both':28} {sum(times.values()):7.3f} ms")
    folder = Path(os.environ.get("OUT", "runs/profile"))
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        "command": " ".join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "options": vars(options),
        "errors": wrong,
        "milliseconds": times,
    }
    (folder / "window-linear-profile.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
