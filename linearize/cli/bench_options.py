"""Options of `linearize bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

from linearize.cli import given


def kernels(parser: argparse.ArgumentParser) -> None:
    """Of `bench kernels`."""
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="operators to time (default: all; a wrong name lists them)",
    )
    parser.add_argument(
        "--tokens",
        type=given.positive,
        metavar="N",
        help="tokens of all sequences together (default: 65536; --quick: 16384)",
    )
    parser.add_argument("--quick", action="store_true", help="two lengths, fewer repeats")
    parser.add_argument(
        "--peers-at",
        type=given.lengths,
        default=(2048, 8192, 32_768),
        metavar="A,B",
        help="lengths at which peers that tune themselves are timed (default: 2048,8192,32768); 0 for none",
    )
    parser.add_argument(
        "--warm-up",
        type=given.positive,
        default=240,
        metavar="SECONDS",
        help="limit of one peer's first call (default: 240)",
    )
    parser.add_argument(
        "--peer-configurations",
        type=given.positive,
        metavar="N",
        help="tune each kernel of a peer among N of its own configurations, drawn once (default: among all)",
    )
    _budget(parser)
    parser.add_argument(
        "--compile", action="store_true", help="make every call once, which compiles and tunes; time nothing"
    )
    _out(parser)


def decode(parser: argparse.ArgumentParser) -> None:
    """Of `bench decode`."""
    parser.add_argument(
        "path",
        metavar="PATH",
        help="a converted checkpoint, a MODEL to convert, or `random`: a known shape with random weights (--shape)",
    )
    parser.add_argument(
        "--teacher", metavar="MODEL", help="what a checkpoint was converted from, timed beside it"
    )
    parser.add_argument(
        "--recipe",
        default="lolcats",
        metavar="NAME",
        help="mixers of a model that is not converted; untrained ones are as fast (default: lolcats)",
    )
    _budget(parser)
    parser.add_argument(
        "--batch",
        type=given.lengths,
        default=(1, 64),
        metavar="A,B",
        help="sequences at once (default: 1,64)",
    )
    parser.add_argument(
        "--context",
        type=given.lengths,
        metavar="A,B",
        help="tokens of the prompts (default: 128,1024,8192; with --recipes: 1024)",
    )
    parser.add_argument(
        "--new-tokens", type=given.positive, default=128, metavar="N", help="tokens timed (default: 128)"
    )
    _shape(parser)
    _recipes(parser, "default: none; --recipe alone, in every way to decode")
    parser.add_argument(
        "--prefill",
        type=given.lengths,
        default=(1024, 8192, 65_536),
        metavar="A,B",
        help="with --recipes: lengths of prompts whose reading is timed (default: 1024,8192,65536)",
    )
    parser.add_argument(
        "--compile",
        nargs="?",
        const="too",
        choices=("too", "alone"),
        help="with --recipes: also the compiled step, or that alone (default: too)",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="with --recipes: also the longest kernels of decoding, in recipes-profile.json",
    )
    parser.add_argument(
        "--only",
        action="store_true",
        help="with --recipes: without the teacher; processes that share --out compile at once and time in turns",
    )
    _device(parser)
    _out(parser)


def recipes(parser: argparse.ArgumentParser) -> None:
    """Of `bench recipes`."""
    _shape(parser)
    _recipes(parser, "default: all, and compositions of no recipe")
    parser.add_argument(
        "--batch", type=given.lengths, default=(16,), metavar="A,B", help="sequences at once (default: 16)"
    )
    parser.add_argument(
        "--length", type=given.lengths, default=(1024,), metavar="A,B", help="tokens of each (default: 1024)"
    )
    parser.add_argument(
        "--largest", action="store_true", help="the largest batch alone, halved until it fits into the memory"
    )
    parser.add_argument(
        "--precision",
        choices=("bf16", "autocast"),
        default="bf16",
        help="bf16 weights with float32 mixers, or as a run has it: float32 weights under autocast (default: bf16)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="the model's blocks compiled, as in stages of 200 steps and more",
    )
    parser.add_argument(
        "--captured", action="store_true", help="steps recorded and replayed in a CUDA graph, as in a run"
    )
    parser.add_argument(
        "--profile", action="store_true", help="also the longest kernels of a step, in recipes-profile.json"
    )
    parser.add_argument(
        "--only",
        action="store_true",
        help="without the teacher; processes that share --out compile at once and time in turns",
    )
    parser.add_argument(
        "--warm",
        action="store_true",
        help="only compile, in a model of two layers; may run in several processes at once",
    )
    _device(parser)
    _budget(parser)
    _out(parser)


def train(parser: argparse.ArgumentParser) -> None:
    """Of `bench train`."""
    parser.add_argument(
        "--shapes",
        type=given.names,
        default=["smollm2-135m", "llama-3.2-1b", "llama-3-8b"],
        metavar="A,B",
        help="of models with random weights (default: smollm2-135m,llama-3.2-1b,llama-3-8b; tiny is for tests)",
    )
    parser.add_argument(
        "--stages",
        type=given.names,
        default=["transfer", "lora", "lora_kl", "all_kl"],
        metavar="A,B",
        help="transfer; weights and matrix (attention weights compared); lora and all (next token); lora_kl and "
        "all_kl (default: transfer, lora, lora_kl, all_kl)",
    )
    _recipes(parser, "default: all, and compositions of no recipe")
    parser.add_argument(
        "--batch", type=given.lengths, metavar="A,B", help="sequences of a step (default: 16, 8, 4 by shape)"
    )
    parser.add_argument(
        "--length",
        type=given.lengths,
        metavar="A,B",
        help="tokens of each (default: 1024, 2048, 2048 by shape)",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="run.precision of the recipes (default: auto)",
    )
    parser.add_argument(
        "--weights",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="run.weights of the recipes, of what does not train (default: auto)",
    )
    parser.add_argument(
        "--kernels",
        choices=("auto", "torch"),
        default="auto",
        help="torch: the same mathematics in plain PyTorch (default: auto)",
    )
    parser.add_argument("--checkpointing", action="store_true", help="compute activations twice, keep none")
    parser.add_argument(
        "--only",
        action="store_true",
        help="without the softmax model's own step; several processes may share --out: they time in turns",
    )
    parser.add_argument(
        "--window-dropout",
        type=given.share,
        default=0.0,
        metavar="RATE",
        help="how often a layer's window is off, in recipes that have both branches (default: 0)",
    )
    parser.add_argument(
        "--no-capture", action="store_true", help="run.capture=false: without a CUDA graph, for comparison"
    )
    parser.add_argument(
        "--profile", action="store_true", help="also what bounds each step, by a profile of one"
    )
    parser.add_argument(
        "--seconds",
        type=given.not_negative,
        default=2.0,
        metavar="S",
        help="of timed steps in a row, after those that compile (default: 2)",
    )
    parser.add_argument(
        "--peak",
        type=given.not_negative,
        metavar="TFLOPS",
        help="bf16 peak that MFU is a share of (default: by the device's name, dense, of its data sheet)",
    )
    _device(parser)
    _budget(parser)
    _out(parser)


def _shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        default="smollm2-135m",
        metavar="NAME",
        help="of the model with random weights: smollm2-135m, llama-3.2-1b, llama-3-8b, tiny (default: smollm2-135m)",
    )


def _recipes(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--recipes",
        type=given.names,
        default=[],
        metavar="A,B",
        help=f"recipes whose mixers are measured, or all ({default})",
    )


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu is for tests (default: cuda)"
    )


def _budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--budget",
        type=given.positive,
        metavar="SECONDS",
        help="start nothing new after this; what is left is listed. First training steps, which compile, do not count",
    )


def _out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/bench"),
        metavar="DIR",
        help="folder of the results (default: runs/bench)",
    )
