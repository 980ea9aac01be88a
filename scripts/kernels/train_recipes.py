"""On a GPU: every recipe's mixers train two steps and decode in a process of their own, on kernels and nothing else.

    PYTHONPATH=. python scripts/kernels/train_recipes.py [--recipes all|A,B] [--jobs 8] [--budget 540] [--out FILE]

Random weights in SmolLM2-135M's shape, with as few layers as hold each of a recipe's mixers; nothing is downloaded.
With ``LINEARIZE_KERNELS=triton``, so that what no kernel covers raises, a recipe passes if

- two steps of a run's own trainer, all weights under bfloat16 autocast, have finite losses and gradients, and the
  mixers compile;
- a prompt and some tokens behind it leave finite states;
- one pass forward and backward is as many operations at twice the length, or as many more at each doubling where a
  rule has levels that double: nothing loops over tokens;
- no torch form of an operator runs in it;
- no kernel and no matrix product in a mixer is given a tensor as large as all keys in float32, where the model computes
  in bfloat16. Casts that are only followed by what is done number by number are listed: a compiler fuses those.

A row of JSON is printed as each recipe ends, and a table at last; exit code 1 if one failed. On the CPU
(``TRITON_INTERPRET=1``, where bfloat16 cannot be trusted) everything is small and in float32.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

STEPS = 2
"""Of the trainer."""
TOKENS = 6
"""That are generated."""
SIZES = {"cuda": (4, 512), "cpu": (1, 16)}
"""Device -> sequences and tokens of a step."""
LENGTHS = {"cuda": (320, 640), "cpu": (16, 32)}
"""Whose operations are compared."""
SMALL = {
    "hidden_size": 32, "intermediate_size": 32, "head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
    "vocab_size": 97,
}  # fmt: skip
"""Changes to the shape on the CPU."""
CHUNKED = ("_torch", "torch_chunk", "chunk_torch", "window_chunk", "cut_documents")
"""Functions of kernels/ that are an operator's torch form; so is whatever ends in _reference."""


def main() -> int:
    """Run the recipes, or with --one a single one in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", default="all", help="names, by commas")
    parser.add_argument("--jobs", type=int, default=8, help="processes at once")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which none is begun")
    parser.add_argument("--out", type=Path, help="JSON file for all rows")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(json.dumps(checked(options.one)) + "\n")
        return 0
    from linearize.bench.subjects import chosen

    rows = []
    for row in at_once(chosen(options.recipes.split(",")), max(1, options.jobs), options.budget):
        rows.append(row)
        say(json.dumps(row))
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    say(table(rows))
    failed = [row["recipe"] for row in rows if row["failures"]]
    say(f"{len(failed)} of {len(rows)} failed: {', '.join(failed)}" if failed else f"all {len(rows)} pass")
    return int(bool(failed))


def at_once(names: list[str], jobs: int, budget: float) -> Iterator[dict[str, Any]]:
    """A row of each recipe as it ends, some processes at a time."""
    started, waiting = time.monotonic(), list(names)
    running: dict[str, tuple[subprocess.Popen[str], Any, float]] = {}
    # many processes compile side by side: each with few helpers of its own
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    settings = {
        "LINEARIZE_KERNELS": "triton", "TORCHINDUCTOR_COMPILE_THREADS": threads, "OMP_NUM_THREADS": threads,
    }  # fmt: skip
    try:
        while waiting or running:
            now = time.monotonic()
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                if now - started > budget:
                    yield {"recipe": name, "failures": ["not begun: the budget is spent"], "seconds": 0.0}
                    continue
                said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with its process
                command = [sys.executable, __file__, "--one", name]
                child = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=said, text=True, env={**os.environ, **settings}
                )
                running[name] = (child, said, now)
            for name, (child, said, begun) in [*running.items()]:
                if child.poll() is None:
                    continue
                del running[name]
                yield {**answer(name, child, said), "seconds": round(time.monotonic() - begun, 1)}
            time.sleep(0.2)
    finally:
        for child, _, _ in running.values():
            child.kill()


def answer(name: str, child: subprocess.Popen[str], said: Any) -> dict[str, Any]:
    """What a process found, or how it ended."""
    assert child.stdout is not None
    lines = child.stdout.read().strip().splitlines()
    with said:
        said.seek(0)
        last = said.read().strip().splitlines()[-3:]
    try:
        row: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        return {"recipe": name, "failures": [f"exit code {child.returncode}: {' '.join(last)[:400]}"]}
    return row


def checked(name: str) -> dict[str, Any]:
    """All checks of one recipe, in this process."""
    import torch

    on_gpu = torch.cuda.is_available()
    row: dict[str, Any] = {"recipe": name, "failures": [], "device": "cuda" if on_gpu else "cpu"}
    model = built(name, row["device"])
    checks: dict[str, Callable[[Any, dict[str, Any]], None]] = {
        "training": trains, "operations": watched, "decoding": decodes
    }  # fmt: skip
    for what, check in checks.items():
        began = time.monotonic()
        try:
            check(model, row)
        except Exception as error:
            traceback.print_exc()
            row["failures"].append(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        row[f"{what}_seconds"] = round(time.monotonic() - began, 1)
    return row


def built(name: str, device: str) -> Any:
    """The recipe's mixers in the shape, which is of the dtype that a run loads on this device."""
    import torch

    from linearize.bench.subjects import convert, layers_of_each, random_model

    changes: dict[str, Any] = {
        "num_hidden_layers": layers_of_each(name),
        **(SMALL if device == "cpu" else {}),
    }
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return convert(random_model(device, dtype, **changes), name)


def trains(model: Any, row: dict[str, Any]) -> None:
    """Steps of the trainer that runs have: it stops where a loss or a gradient is not finite."""
    import torch
    from transformers import TrainerCallback

    from linearize.config.schema import RunConfig, StageConfig
    from linearize.distill import stages
    from linearize.distill.device import resolve_precision
    from linearize.distill.rates import RandomText
    from linearize.mixers import compiled

    batch, length = SIZES[row["device"]]
    run = RunConfig(device=row["device"], workers=0, compile="never")
    stage = StageConfig(
        objective={"next_token": 1.0}, train=["all"], tokens=100 * batch * length, batch_size=batch,
        log_every=1000, save_every=1000,
    )  # fmt: skip
    losses: list[float] = []

    class Few(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            losses.append(trainer.take_window()["loss"])
            control.should_training_stop = len(losses) >= STEPS

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        opened = stages.training(
            model, stage, name="all", folder=Path(folder), run=run, seed=0,
            dataset=RandomText(model.config.vocab_size, length, 4 * batch), length=length,
            autocast=resolve_precision(run, torch.device(row["device"])), teacher=None,
        )  # fmt: skip
        with opened as trainer:
            trainer.add_callback(Few())
            trainer.train()
    row["losses"] = [round(loss, 4) for loss in losses]
    row["compiled"] = len(compiled._made)
    row["failures"] += [str(note.message)[:300] for note in notes if "not be compiled" in str(note.message)]
    if len(losses) != STEPS:
        row["failures"].append(f"training: {len(losses)} steps")
    if row["device"] == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)


def watched(model: Any, row: dict[str, Any]) -> None:
    """One pass part by part, looked at operation by operation, at two lengths."""
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
    tests: Any = importlib.import_module("watched")
    device, config = row["device"], model.config
    batch, found, before = SIZES[device][0], [], os.environ.get("LINEARIZE_COMPILE")
    os.environ["LINEARIZE_COMPILE"] = "never"
    model.train().requires_grad_(True)
    half = torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if device == "cuda" else nullcontext()
    lengths = LENGTHS[device]
    if any(hasattr(getattr(module, "update", None), "levels") for module in model.modules()):
        lengths = (*lengths, 2 * lengths[-1])
    with torch_forms() as forms:
        for length in (lengths[0], *lengths):  # the first pass of all does more
            ids = torch.randint(config.vocab_size, (batch, length), device=device)
            look = tests.Watched(length, batch * length * config.num_key_value_heads * config.head_dim)
            with look.mixers():
                with half:
                    made = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
                made.float().square().mean().backward()
            model.zero_grad(set_to_none=True)
            found.append(look)
    os.environ.pop("LINEARIZE_COMPILE")
    os.environ |= {} if before is None else {"LINEARIZE_COMPILE": before}
    long, counts = found[-1], [look.operations for look in found[1:]]
    row |= {"operations": counts, "kernels": dict(long.kernels)}
    row |= {"casts": dict(long.casts), "wide": dict(long.wide)}
    grown = [after - before for before, after in itertools.pairwise(counts)]
    if grown[-1] > (grown[0] if len(grown) > 1 else 0):
        row["failures"].append(f"{counts} operations at {list(lengths)} tokens")
    row["failures"] += [f"a torch form runs: {name}" for name in forms]
    if device == "cuda":  # elsewhere everything is in float32
        row["failures"] += [f"in float32: {name}" for name in long.wide]


def decodes(model: Any, row: dict[str, Any]) -> None:
    """A prompt, and tokens behind it, in the captured step where there is a GPU."""
    import torch

    from linearize.decode import Decoder
    from linearize.decode.cache import tensors
    from linearize.decode.ways import half

    device = row["device"]
    model = (half(model) if device == "cuda" else model).eval().requires_grad_(False)
    batch, length = SIZES[device]
    ids = torch.randint(model.config.vocab_size, (batch, length // 2), device=device)
    decoder = Decoder(model, batch, length=length, capture=device == "cuda")
    made = decoder.generate(ids, None, TOKENS)
    row["decoded"] = made.shape[1]
    states = {name: x for name, x in tensors(decoder.cache).items() if x.is_floating_point()}
    row["failures"] += [f"not finite: {name}" for name, x in states.items() if not x.isfinite().all()]


@contextmanager
def torch_forms() -> Iterator[Counter[str]]:
    """Inside, which of the operators' torch forms are called."""
    seen: Counter[str] = Counter()

    def look(frame: Any, event: str, argument: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        if "kernels" not in code.co_filename:
            return
        path = Path(code.co_filename)
        torch_form = code.co_name in CHUNKED or code.co_name.endswith("_reference")
        if torch_form and path.parent.parent.name == "kernels":
            seen[f"{path.parent.name}.{code.co_name}"] += 1

    sys.setprofile(look)
    try:
        yield seen
    finally:
        sys.setprofile(None)


def table(rows: list[dict[str, Any]]) -> str:
    """One line a recipe."""
    lines = [f"{'recipe':26} {'seconds':>7}  {'losses':18} operations  kernels; casts; failures"]
    for row in sorted(rows, key=lambda row: row["recipe"]):
        operations = "/".join(str(count) for count in row.get("operations", []))
        kernels = ", ".join(name for name in row.get("kernels", {}) if not name.endswith("_backward"))
        casts = ", ".join(f"{place} {count}" for place, count in row.get("casts", {}).items())
        failures = "; ".join(row["failures"]) or "none"
        losses = " ".join(str(loss) for loss in row.get("losses", []))
        lines.append(
            f"{row['recipe']:26} {row['seconds']:7.1f}  {losses:18} {operations:11} {kernels}; {casts}; {failures}"
        )
    return "\n".join(lines)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
