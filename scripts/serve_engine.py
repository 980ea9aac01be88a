"""The engine of `linearize serve` without HTTP, beside the teacher in transformers' continuous batching.

So many texts of one length are read, then all of them decode together; tokens/s is that of the time in which all rows
decode, and "all" is the whole job, reading included. A way that does not fit, or fails, is a row that says so.

    python scripts/serve_engine.py runs/demo --against smollm2-135m --slots 1 64 512 --context 8192 \
        --out docs/results/serve.json

Rows that FILE has already, of the same machine and lengths, stay beside the new ones, so that a way may have a call of
its own (--ways), which may be cut off.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import paged_flash as flash
import torch
import transformers
from serve_results import part, put
from transformers import ContinuousBatchingConfig, GenerationConfig

from linearize.cli.checkpoint import load
from linearize.decode.row_choice import Wish
from linearize.decode.slots import Slots
from linearize.errors import LinearizeError
from linearize.export.rounding import in_dtype

ROOT = Path(__file__).resolve().parent.parent
STEPS = 16
"""Steps between two looks of the host."""


def main(arguments: list[str] | None = None) -> int:
    """Measure and write, row by row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", metavar="PATH", help="a conversion")
    parser.add_argument("--against", metavar="MODEL", help="its teacher")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 64, 512], metavar="N")
    parser.add_argument("--context", type=int, default=8192, metavar="TOKENS")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="new ones of each text")
    parser.add_argument(
        "--piece", type=int, default=8192, metavar="TOKENS", help="of prompts that are read at once"
    )
    parser.add_argument("--prompts", type=int, default=8, metavar="N", help="that share these tokens")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--note", metavar="TEXT", help="a sentence for the table, such as what else the machine had to do"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    kept = part(options.out, "engine")
    found: dict[str, Any] = {
        "commands": [],
        "date": datetime.now(UTC).date().isoformat(),
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip(),
        "machine": _machine(options.device),
        "settings": {name: getattr(options, name) for name in ("context", "dtype")},
        "notes": [],
        "rows": [],
    }
    if all(kept.get(name) == found[name] for name in ("machine", "settings")):
        found |= {name: kept[name] for name in ("commands", "notes", "rows")}
    found["commands"].append(shlex.join(["python", "scripts/serve_engine.py", *(arguments or sys.argv[1:])]))
    found["notes"] += [options.note] if options.note else []
    for name in options.ways:
        _, way, of_teacher = WAYS[name]
        path = options.against if of_teacher else options.path
        if path is None:
            continue
        model = in_dtype(load(path, options.device)[0], getattr(torch, options.dtype))
        for slots in options.slots:
            _empty()
            row: dict[str, Any] = {"way": name, "slots": slots, "tokens": options.tokens}
            row |= {"commit": found["commit"], "refused": "was cut off before it ended"}
            _write(found, row, options)
            del row["refused"]
            try:
                row |= way(model, slots, options)
            except (LinearizeError, RuntimeError, ValueError, MemoryError) as error:
                row["refused"] = " ".join(str(error).split())[:200]
            if model.device.type == "cuda":
                row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            print(json.dumps(row), flush=True)
            _write(found, row, options)
        del model
    return 0


def _machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device != "cpu" and torch.cuda.is_available() else "CPU"
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"


def _write(found: dict[str, Any], row: dict[str, Any], options: argparse.Namespace) -> None:
    def key(each: dict[str, Any]) -> tuple[Any, ...]:
        return each["way"], each["slots"], each["tokens"], each["commit"]

    found["rows"] = [each for each in found["rows"] if key(each) != key(row)] + [row]
    order = list(WAYS)
    found["rows"].sort(key=lambda each: (order.index(each["way"]), each["slots"]))
    put(options.out, "engine", found, _table(found))


def _prompts(model: Any, slots: int, context: int) -> list[list[int]]:
    dice = torch.Generator().manual_seed(0)
    words = model.get_input_embeddings().weight.shape[0]
    return torch.randint(3, words, (slots, context), generator=dice).tolist()


@torch.no_grad()
def _slots(model: Any, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    together = min(options.prompts, rows)
    slots = Slots(model, rows, options.context + options.tokens, prompts=together)
    slots.prepare()
    prompts = _prompts(model, rows, options.context)
    for count in {together, rows % together or together}:  # kernels compile
        _read(slots, prompts[:count], options.piece)
        for prompt in reversed(range(count)):
            slots.forget(prompt)
    began = _now(model)
    for first in range(0, rows, together):
        group = prompts[first : first + together]
        slots.admit(range(len(group)), _read(slots, group, options.piece), [Wish()] * len(group))
    read = _now(model)
    made = 1
    while made < options.tokens:
        made += slots.run(min(STEPS, options.tokens - made)).tokens.shape[1]
    ended = _now(model)
    return _numbers(rows, options, began, read, ended) | {"slot_mib": round(slots.bytes / rows / 2**20, 2)}


def _read(slots: Slots, prompts: list[list[int]], piece: int) -> torch.Tensor:
    for _ in prompts:
        slots.begin()
    width = max(1, piece // len(prompts))
    for first in range(0, len(prompts[0]), width):
        logits = slots.read([ids[first : first + width] for ids in prompts])
    return logits


def _continuous(model: Any, rows: int, options: argparse.Namespace, *, own: bool = False) -> dict[str, Any]:
    config = GenerationConfig(max_new_tokens=options.tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    prompts = _prompts(model, rows, options.context)
    with torch.no_grad():
        likely = model(torch.tensor(prompts[:1], device=model.device), logits_to_keep=1).logits[0, -1].float()
    # as many pages as the texts need; without a number it would take nine tenths of the memory
    pages = rows * (-(-(options.context + options.tokens) // 256) + 1) + 8
    settings = {"num_blocks": pages, "max_batch_tokens": options.piece, "scheduler_type": "prefill_first"}

    def made(prompts: list[list[int]]) -> list[Any]:
        given = ContinuousBatchingConfig(**settings)
        with nullcontext() if own else flash.used(model):
            found = model.generate_batch(
                prompts, generation_config=config, continuous_batching_config=given, record_timestamps=True
            )
        return list(found.values())

    first = made(prompts[:1])  # kernels compile
    if not first or not first[0].generated_tokens:
        raise RuntimeError("nothing was made")
    if likely.max() - likely[first[0].generated_tokens[0]] > 0.5:
        raise RuntimeError("its first token is not what the model itself finds likely")
    texts = made(prompts)
    short = [len(text.generated_tokens) for text in texts if len(text.generated_tokens) != options.tokens]
    if len(texts) != rows or short:
        raise RuntimeError(f"{rows - len(texts)} texts are missing and {len(short)} are short")
    # without what the manager does before the first text and behind the last
    began, ended = min(text.lifespan[0] for text in texts), max(text.timestamps[-1] for text in texts)
    # from when the last text has its first token, every row decodes, until the first one ends
    all_run, one_ends = max(text.timestamps[0] for text in texts), min(text.timestamps[-1] for text in texts)
    inside = sum(all_run < at <= one_ends for text in texts for at in text.timestamps)
    numbers = {
        "all_seconds": round(ended - began, 3),
        "all_tokens_per_second": round(rows * options.tokens / (ended - began), 1),
    }
    if inside >= rows:
        numbers["tokens_per_second"] = round(inside / (one_ends - all_run), 1)
    return numbers


def _numbers(
    rows: int, options: argparse.Namespace, began: float, read: float, ended: float
) -> dict[str, Any]:
    return {
        "all_seconds": round(ended - began, 3),
        "all_tokens_per_second": round(rows * options.tokens / (ended - began), 1),
        "tokens_per_second": round(rows * (options.tokens - 1) / (ended - read), 1),
        "prompt_tokens_per_second": round(rows * options.context / (read - began)),
    }


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _empty() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _table(found: dict[str, Any]) -> str:
    settings = found["settings"]
    lines = [
        "# The engine of `linearize serve`",
        "",
        *(f"    {command}" for command in found["commands"]),
        "",
        f"{found['date']}, {found['machine']}, {settings['dtype']}. {settings['context']:,} tokens of prompt for every "
        "text; tokens/s while all rows decode, and of the whole job, reading included. An empty cell: not told, or not "
        "all rows ever decoded at once.",
        "",
        *(line for note in found["notes"] for line in (note, "")),
        "| way | commit | texts at once | new tokens | tokens/s, decoding | tokens/s, whole job | prompt tokens/s "
        "| slot, MiB | peak, GiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        begins = f"| {WAYS[row['way']][0]} | {row['commit']} | {row['slots']} | {row['tokens']} | "
        if "refused" in row:
            lines.append(f"{begins}{row['refused']} | | | | |")
            continue
        names = (
            "tokens_per_second", "all_tokens_per_second", "prompt_tokens_per_second", "slot_mib", "peak_gib",
        )  # fmt: skip
        cells = (f"{row[name]:,}" if name in row else "" for name in names)
        lines.append(begins + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


WAYS: dict[str, tuple[str, Callable[..., dict[str, Any]], bool]] = {
    "conversion": ("conversion in slots", _slots, False),
    "teacher": ("teacher in slots", _slots, True),
    "continuous": (
        "teacher in transformers' continuous batching, on torch's flash attention",
        _continuous,
        True,
    ),
    "continuous_sdpa": ("the same as it comes, `paged\\|sdpa`", partial(_continuous, own=True), True),
}
"""Name -> in words, what measures it, and whether the teacher is measured."""


if __name__ == "__main__":
    sys.exit(main())
