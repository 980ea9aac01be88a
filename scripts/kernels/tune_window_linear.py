"""Try other configurations of window_linear's kernels, one kernel at a time, on a CUDA device.

    python scripts/kernels/tune_window_linear.py [--kernels A,B] [--jobs 6] [--budget 120] [--out FILE]

At the benchmark's size: 8 x 8,192 tokens, 16 heads of 64, window 64, bfloat16. Every kernel of the plan's table that
runs there is timed as it is and in its variants (warps, stages, registers a thread), the others as they are:
milliseconds of that kernel (median of twelve passes, events around each launch), and how far the output and the
gradients are from those of the table's own configurations, since a configuration can also be wrong. A process a
kernel: they compile at once, and time one after the other. A row of JSON is printed, and written, as it comes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from filelock import FileLock

SIZE, WINDOW = (8, 8192, 16, 64), 64
KERNELS = {
    "aligned_key_gradient": "aligned_key_gradient_kernel",
    "aligned_query_gradient": "aligned_query_gradient_kernel",
    "aligned_output": "aligned_output_kernel",
    "split_query_states": "query_states_kernel",
    "key_states": "key_states_kernel",
    "map_gradient": "map_gradient_kernel",
}
"""Entry of the table -> kernel; the slowest first."""
WARPS, STAGES, REGISTERS = (4, 8), (1, 2, 3, 4), (0, 128, 168, 200)


def main() -> int:
    """Run a process for each kernel, or with --one that of one kernel in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", default=",".join(KERNELS), help="entries of the table, by commas")
    parser.add_argument("--jobs", type=int, default=6, help="processes at once")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds after which nothing is begun")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/profile/window-linear-tuning.json"), help="all rows"
    )
    parser.add_argument("--turn", type=Path, help="file that others who time on this device lock too")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.kernels.split(",")
    unknown = [name for name in names if name not in KERNELS]
    if unknown:
        parser.error(f"--kernels {unknown[0]}: not one of {', '.join(KERNELS)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    turn = options.turn or options.out.with_suffix(".turn")
    if options.one:
        for name in names:
            tuned(name, options.out, turn, time.monotonic() + options.budget)
        return 0
    started, waiting, running, codes = time.monotonic(), names, list[Any](), list[int]()
    while waiting or running:
        while waiting and len(running) < options.jobs:
            left = options.budget - (time.monotonic() - started)
            command = [sys.executable, __file__, "--one", "--kernels", waiting.pop(0), "--budget", str(left)]
            running.append(subprocess.Popen([*command, "--out", str(options.out), "--turn", str(turn)]))
        codes += [child.returncode for child in running if child.poll() is not None]
        running = [child for child in running if child.poll() is None]
        time.sleep(0.1)
    return max(codes)


def variants(found: Any) -> list[Any]:
    """The table's own configuration, then all that differ from it in one number, then in two."""
    from dataclasses import replace

    every = [
        replace(found, warps=warps, stages=stages, registers=registers)
        for warps, stages, registers in itertools.product(
            WARPS, STAGES, sorted({*REGISTERS, found.registers})
        )
    ]

    def distance(other: Any) -> int:
        return sum(getattr(other, name) != getattr(found, name) for name in ("warps", "stages", "registers"))

    # eight warps have half the registers a thread already: a limit below 128 would only spill
    every = [x for x in every if not (x.warps == 8 and x.registers)]
    return sorted((x for x in every if distance(x) <= 2), key=distance)


def tuned(name: str, out: Path, turn: Path, end: float) -> None:
    """Rows of one kernel."""
    import torch
    from profile_window_linear import call, inputs, profile

    from linearize.kernels.window_linear import plan

    tensors, table = inputs(*SIZE), plan.CONFIGS[name]
    given = torch.randn_like(tensors[2])

    def results() -> list[Any]:
        out = call(tensors, WINDOW)
        return [out.detach(), *torch.autograd.grad(out, tensors, given)]

    own = results()
    for config in variants(table[64]):
        if time.monotonic() > end:
            break
        row: dict[str, Any] = {"kernel": name, "warps": config.warps, "stages": config.stages}
        row |= {"registers": config.registers}
        table[64] = config
        try:
            pairs = zip(results(), own, strict=True)
            apart = max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)
            with FileLock(turn):
                times = profile(tensors, WINDOW)
            row |= {"ms": round(times[KERNELS[name]], 4), "all_ms": round(sum(times.values()), 4)}
            row |= {"apart": float(f"{apart:.2e}"), "device": torch.cuda.get_device_name()}
        except Exception as error:
            # what does not fit is a row too
            row["note"] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            if "CUDA error" in row["note"]:
                end = 0.0
        kept(out, row)


def kept(out: Path, row: dict[str, Any]) -> None:
    """Print a row and put it into the file that all processes share."""
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()
    with FileLock(out.with_suffix(".lock")):
        rows = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []
        out.write_text(json.dumps([*rows, row], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
