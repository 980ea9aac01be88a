"""The steps of docs/blocks.md on a model of Llama 3 70B's grouping whose widths are 128 times smaller.

Blocks of an eighth of the layers, two workers, joined and exported without anybody holding the model; then the same
recipe as one run with the whole model, and what differs. The closed-form start is left out, which takes minutes at 80
layers (`tests/distill/blockwise` holds it equal):

PYTHONPATH=. python scripts/results/blocks_small.py --out runs/blocks-small --depth 16
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from linearize import models
from linearize.cost.shapes import LARGE
from linearize.distill.pieces import Pieces
from linearize.eval import tables

SMALLER = 128
SETTINGS = [
    "stages.transfer.clip_by=layer",
    "stages.transfer.tokens=2048",
    "stages.transfer.batch_size=4",
    "stages.transfer.log_every=1",
    "~stages.recover",
    "calibrate.tokens=0",
    "data.length=128",
    "eval.length=128",
    "eval.max_windows=1",
    "eval.ablations=false",
    "mixer.feature_map.dim=8",
    "mixer.window.size=16",
    "run.device=cpu",
]


def teacher(folder: Path, depth: int) -> None:
    """A random checkpoint of so many layers, with the tokenizer of smollm2-135m."""
    shape = dict(LARGE["llama-3-70b"])
    for key in ("hidden_size", "intermediate_size"):
        shape[key] //= SMALLER
    tokenizer = AutoTokenizer.from_pretrained(models.resolve("smollm2-135m"))
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": len(tokenizer)}
    shape["num_hidden_layers"] = depth
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.1)).save_pretrained(
        folder, max_shard_size="5MB"
    )
    tokenizer.save_pretrained(folder)


def steps(commands: list[list[str]]) -> float:
    """Seconds that commands take side by side."""
    started = time.monotonic()
    running = [subprocess.Popen([sys.executable, "-m", "linearize", *command]) for command in commands]
    if any([process.wait() for process in running]):
        sys.exit("a command has failed")
    return time.monotonic() - started


def main() -> int:
    """Print what each step took, and in what the two results differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=80, help="layers (default: those of Llama 3 70B)")
    options = parser.parse_args()
    out, depth = options.out, options.depth
    shutil.rmtree(out, ignore_errors=True)
    teacher(out / "teacher", depth)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    model, blocks, whole = str(out / "teacher"), out / "blocks", out / "whole"
    given = [model, "lolcats", *SETTINGS]
    again = [model, str(blocks / "recipe.yaml"), "--out", str(blocks)]
    seconds = {
        "write": steps([["blocks", "write", *given, "--out", str(blocks), "--layers", str(depth // 8)]])
    }
    streams = sorted((blocks / "streams").rglob("*.bin"))
    size = sum(file.stat().st_size for file in streams)
    seconds["train, two workers"] = steps([["blocks", "train", *again]] * 2)
    seconds["join and export"] = steps([["blocks", "join", *again, "--export"]])
    seconds["one run with the whole model"] = steps([["run", *given, "--out", str(whole)]])
    print(tables.markdown([{"step": step, "s": f"{value:.0f}"} for step, value in seconds.items()]))
    print(f"\n{len(streams)} streams, {size / 1e6:.1f} MB")
    for stage in ("stage-1-transfer",):
        pair = [Pieces(folder / stage / "final.safetensors") for folder in (blocks, whole)]
        assert list(pair[0].shapes) == list(pair[1].shapes)
        most = max(float((pair[0].whole(n) - pair[1].whole(n)).abs().max()) for n in pair[0].shapes)
        print(f"{stage}: {len(pair[0].shapes)} tensors, largest difference {most:g}")
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (blocks, whole)
    ]
    most = max(
        abs(a - b)
        for one, other in zip(*lines, strict=True)
        for a, b in zip(one["layers"], other["layers"], strict=True)
    )
    print(
        f"losses of {len(lines[0])} steps and {len(lines[0][0]['layers'])} layers: largest difference {most:g}"
    )
    pair = [
        Pieces(file)
        for file in (blocks / "checkpoint/model.safetensors", whole / "checkpoint/model.safetensors")
    ]
    equal = all(torch.equal(pair[0].whole(name), pair[1].whole(name)) for name in pair[1].shapes)
    print(f"checkpoints: {len(pair[1].shapes)} tensors, {'equal' if equal else 'DIFFERENT'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
